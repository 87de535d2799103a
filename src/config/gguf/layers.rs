//! Which layer rotates how: windows, layers without rotation, layers without attention.

use super::architectures::{Attention, Pattern, Rotates, Switch, Window};
use super::file::{File, MAX_LAYERS};
use super::{Kind, value::GgufValue};
use crate::config::model::{LayerRule, Layers};
use crate::config::{ConfigError, RopeConfig};

const WINDOW: &str = "attention.sliding_window";
const PATTERN: &str = "attention.sliding_window_pattern";
const RATIOS: &str = "attention.compress_ratios";

/// Which layers are attention of the tokens among each other.
enum Attending {
    All,
    Listed(Vec<bool>),
    /// The key would say it.
    Unknown(String),
}

impl File<'_, '_> {
    pub fn rotates_at_all(&self) -> Result<bool, ConfigError> {
        Ok(match self.architecture.switch {
            Switch::Always => true,
            Switch::Finetuned => match self.get("rope.scaling.finetuned") {
                None => true,
                Some(GgufValue::Bool(rotates)) => rotates,
                Some(_) => return Err(self.invalid("rope.scaling.finetuned", "true or false")),
            },
            Switch::Layers(layers) => {
                let count = self.count("block_count")?.ok_or_else(|| {
                    self.missing(
                        "block_count",
                        "it tells models with positions in the rotation from those without",
                    )
                })?;
                count == layers
            }
        })
    }

    pub fn kinds(&self) -> Result<(Vec<(String, RopeConfig)>, Layers), ConfigError> {
        let count = self.layer_count()?;
        let (kinds, rule) = match self.architecture.window {
            Window::Compressed => self.compressed(count)?,
            _ => self.by_window(self.pattern()?, count)?,
        };
        let named = |kind: &Kind| Ok((kind.name().to_string(), self.rope(*kind)?));
        let kinds: Vec<_> = kinds
            .iter()
            .map(named)
            .collect::<Result<_, ConfigError>>()?;
        let alike = kinds.iter().all(|(_, config)| *config == kinds[0].1);
        let rule = match rule {
            LayerRule::Unknown(_) if alike && self.architecture.rotates == Rotates::All => {
                LayerRule::All(0)
            }
            rule => rule,
        };
        let mut layers = Layers { count, rule };
        self.leave_out_layers_without_attention(&mut layers)?;
        Ok((kinds, layers))
    }

    /// Kinds of layers that rotate, and which layer is of which.
    fn by_window(
        &self,
        pattern: Option<Pattern>,
        count: Option<u64>,
    ) -> Result<(Vec<Kind>, LayerRule), ConfigError> {
        let slides = match pattern {
            Some(pattern) => self.sliding_layers(pattern, count)?,
            None => count.map(|count| vec![false; count as usize]),
        };
        let Some(slides) = slides else {
            let key = match pattern {
                Some(Pattern::Given) => PATTERN,
                _ => "block_count",
            };
            let kinds = match (pattern, self.architecture.rotates) {
                (None, _) => vec![Kind::Full],
                (Some(_), Rotates::Sliding) => vec![Kind::Sliding],
                (Some(_), _) => vec![Kind::Sliding, Kind::Full],
            };
            return Ok((kinds, LayerRule::Unknown(self.key(key))));
        };
        let rotates = self.rotating_layers(&slides, pattern.is_some())?;
        let layers: Vec<Option<Kind>> = slides
            .iter()
            .zip(rotates)
            .map(|(&slides, rotates)| match (rotates, slides) {
                (false, _) => None,
                (true, true) => Some(Kind::Sliding),
                (true, false) => Some(Kind::Full),
            })
            .collect();
        self.listed(&[Kind::Sliding, Kind::Full], &layers)
    }

    /// The layers of DeepSeek-V4.
    fn compressed(&self, count: Option<u64>) -> Result<(Vec<Kind>, LayerRule), ConfigError> {
        let Some(mut ratios) = self.flags(RATIOS)? else {
            let rule = LayerRule::Unknown(self.key(RATIOS));
            return Ok((vec![Kind::Main, Kind::Compressed], rule));
        };
        if let Some(count) = count {
            if (ratios.len() as u64) < count {
                return Err(self.invalid(RATIOS, format!("an entry for each of {count} layers")));
            }
            ratios.truncate(count as usize);
        }
        let kind = |&compresses: &bool| {
            Some(if compresses {
                Kind::Compressed
            } else {
                Kind::Main
            })
        };
        let layers: Vec<_> = ratios.iter().map(kind).collect();
        self.listed(&[Kind::Main, Kind::Compressed], &layers)
    }

    /// Those of `kinds` that any layer is of, and the layers by them.
    fn listed(
        &self,
        kinds: &[Kind],
        layers: &[Option<Kind>],
    ) -> Result<(Vec<Kind>, LayerRule), ConfigError> {
        let used = kinds.iter().copied();
        let used: Vec<Kind> = used.filter(|kind| layers.contains(&Some(*kind))).collect();
        if used.is_empty() {
            return Err(ConfigError::NoRotation {
                what: format!("architecture {:?}, as it is configured here,", self.name),
            });
        }
        let index = |kind: &Option<Kind>| used.iter().position(|used| Some(*used) == *kind);
        let rule = LayerRule::Listed(layers.iter().map(index).collect());
        Ok((used, rule))
    }

    /// How the layers with a window are told from those without; `None` if no layer has one.
    pub fn pattern(&self) -> Result<Option<Pattern>, ConfigError> {
        let given = self.number(WINDOW)?;
        Ok(match self.architecture.window {
            Window::Alike | Window::Compressed => None,
            Window::By(pattern) => Some(pattern),
            Window::IfGiven(pattern) => given.filter(|&window| window > 0.0).map(|_| pattern),
            Window::UnlessZero(_) if given == Some(0.0) => None,
            Window::UnlessZero(pattern) => Some(pattern),
            Window::IfLayers(layers, pattern) => match self.layer_count()? {
                Some(count) if count - self.further_layers(count)? != layers => None,
                _ => Some(pattern),
            },
        })
    }

    /// Whether the first layer has a window.
    pub fn first_slides(&self) -> Result<bool, ConfigError> {
        // Layers of DeepSeek-V4 have a window besides what they compress.
        if self.is_like_deepseek4()? {
            return Ok(true);
        }
        let Some(pattern) = self.pattern()? else {
            return Ok(false);
        };
        let slides = self.sliding_layers(pattern, Some(self.layer_count()?.unwrap_or(1)))?;
        Ok(slides.is_some_and(|slides| slides.first() == Some(&true)))
    }

    fn sliding_layers(
        &self,
        pattern: Pattern,
        count: Option<u64>,
    ) -> Result<Option<Vec<bool>>, ConfigError> {
        if let Some(mut slides) = self.flags(PATTERN)? {
            // Layers that the array does not reach have none.
            if let Some(count) = count {
                slides.resize(count as usize, false);
            }
            return Ok(Some(slides));
        }
        let (own_period, first) = match pattern {
            Pattern::Given if self.get(PATTERN).is_some() => {
                return Err(self.invalid(PATTERN, "an array"));
            }
            Pattern::Given => return Ok(None),
            Pattern::LastOf(period) => (period, false),
            Pattern::FirstOf(period) => (period, true),
        };
        let period = self.whole(PATTERN)?.unwrap_or(own_period);
        let Some(count) = count else {
            return Ok(None);
        };
        let main = count - self.further_layers(count)?;
        let slides = |layer: u64| {
            let windowed = match period {
                0 => true,
                _ if first => !layer.is_multiple_of(period),
                _ => layer % period < period - 1,
            };
            windowed && layer < main
        };
        Ok(Some((0..count).map(slides).collect()))
    }

    /// Which layers rotate, if they attend.
    fn rotating_layers(&self, slides: &[bool], windowed: bool) -> Result<Vec<bool>, ConfigError> {
        let count = slides.len() as u64;
        let main = count - self.further_layers(count)?;
        let all_but_last_of = |period: u64| (0..count).map(move |layer| (layer + 1) % period != 0);
        Ok(match self.architecture.rotates {
            Rotates::All => vec![true; slides.len()],
            Rotates::Sliding if !windowed => vec![true; slides.len()],
            Rotates::Sliding => slides.to_vec(),
            Rotates::SlidingOrLeading => {
                let leading = self.whole("leading_dense_block_count")?.unwrap_or(0);
                let layers = (0..count).zip(slides);
                layers
                    .map(|(layer, &slides)| slides || layer < leading || layer >= main)
                    .collect()
            }
            Rotates::AllButLastOf(period) => all_but_last_of(period).collect(),
            Rotates::AllButLastOfBesideWindow(period) => {
                all_but_last_of(if windowed { period } else { main.max(1) }).collect()
            }
            Rotates::AllButFirstOfBesideWindow(period) if windowed && main != period => {
                (0..count).map(|layer| layer % period != 0).collect()
            }
            Rotates::AllButFirstOfBesideWindow(_) => vec![true; slides.len()],
            Rotates::AllButDecision => {
                let decision = self.whole("decision.block_count")?.unwrap_or(0);
                let first = main.saturating_sub(decision);
                (0..count).map(|layer| layer < first).collect()
            }
            Rotates::Listed => {
                let key = "attention.rope_pattern";
                match self.flags(key)? {
                    None if self.get(key).is_some() => return Err(self.invalid(key, "an array")),
                    None => vec![true; slides.len()],
                    Some(mut rotates) => {
                        // Layers that the array does not reach rotate.
                        rotates.resize(slides.len(), true);
                        rotates
                    }
                }
            }
        })
    }

    /// Layers that predict further tokens, which come last.
    fn further_layers(&self, count: u64) -> Result<u64, ConfigError> {
        let further = self.whole("nextn_predict_layers")?.unwrap_or(0);
        if further > count {
            return Err(self.invalid(
                "nextn_predict_layers",
                format!("at most {}, which is {count}", self.key("block_count")),
            ));
        }
        Ok(further)
    }

    fn layer_count(&self) -> Result<Option<u64>, ConfigError> {
        match self.count("block_count")? {
            Some(count) if count > MAX_LAYERS => {
                Err(self.invalid("block_count", format!("at most {MAX_LAYERS}")))
            }
            count => Ok(count),
        }
    }

    fn leave_out_layers_without_attention(&self, layers: &mut Layers) -> Result<(), ConfigError> {
        let attends = match self.attending(layers.count)? {
            Attending::All => return Ok(()),
            Attending::Unknown(key) => {
                layers.rule = LayerRule::Unknown(key);
                return Ok(());
            }
            Attending::Listed(attends) => attends,
        };
        let kinds: Vec<Option<usize>> = match &layers.rule {
            LayerRule::All(kind) => vec![Some(*kind); attends.len()],
            LayerRule::Listed(kinds) => kinds.clone(),
            LayerRule::Unknown(_) => return Ok(()),
        };
        let attends = attends.into_iter().chain(std::iter::repeat(true));
        let kinds: Vec<_> = kinds
            .into_iter()
            .zip(attends)
            .map(|(kind, attends)| kind.filter(|_| attends))
            .collect();
        if kinds.iter().all(Option::is_none) {
            return Err(ConfigError::NoRotation {
                what: format!("architecture {:?}, without heads in any layer,", self.name),
            });
        }
        layers.rule = LayerRule::Listed(kinds);
        Ok(())
    }

    /// Which layers are attention of the tokens among each other.
    fn attending(&self, count: Option<u64>) -> Result<Attending, ConfigError> {
        let key = "attention.head_count_kv";
        if let Attention::Interval(period) = self.architecture.attention {
            return self.attending_by_interval(period, count);
        }
        let heads = [self.flags("attention.head_count")?, self.flags(key)?];
        let length = heads.iter().flatten().map(Vec::len).max();
        let Some(length) = length else {
            // One number is for all layers.
            let told = self.architecture.attention == Attention::All || self.get(key).is_some();
            return Ok(if told {
                Attending::All
            } else {
                Attending::Unknown(self.key(key))
            });
        };
        if let Some(count) = count
            && length as u64 != count
        {
            let key = match &heads[1] {
                Some(_) => key,
                None => "attention.head_count",
            };
            return Err(self.invalid(
                key,
                format!("an array with an entry for each of {count} layers"),
            ));
        }
        let has = |layer: usize| {
            let mut lists = heads.iter().flatten();
            lists.all(|list| list.get(layer) != Some(&false))
        };
        Ok(Attending::Listed((0..length).map(has).collect()))
    }

    fn attending_by_interval(
        &self,
        period: u64,
        count: Option<u64>,
    ) -> Result<Attending, ConfigError> {
        if let Some(recurrent) = self.flags("attention.recurrent_layers")? {
            let attends = recurrent.into_iter().map(|recurrent| !recurrent).collect();
            return Ok(Attending::Listed(attends));
        }
        let period = self.count("full_attention_interval")?.unwrap_or(period);
        let Some(count) = count else {
            return Ok(Attending::Unknown(self.key("block_count")));
        };
        let first = count - self.further_layers(count)?;
        let attends = |layer| layer >= first || (layer + 1) % period == 0;
        Ok(Attending::Listed((0..count).map(attends).collect()))
    }
}
