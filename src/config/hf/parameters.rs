//! One kind of layer: theta, dims, scaling, pairing, axes and score scale.

use super::section::Section;
use super::{Model, is_vision};
use crate::Pairing;
use crate::config::families::{self, DefaultAxes, HeadDim, Kind, Score};
use crate::config::pairing::{OutputOrder, PairingRule};
use crate::config::scaling::{
    DynamicNtkScaling, LinearScaling, Llama3Scaling, LongRopeScaling, NtkAlphaScaling,
    ProportionalScaling, QwenNtkScaling, Scaling, YarnScaling, fraction,
};
use crate::config::{Axes, ConfigError, RopeConfig, formulas};

const KNOWN_TYPES: &str =
    "default, linear, dynamic, ntk_alpha, yarn, longrope (su), llama3, proportional and mrope";

/// Where the parameters of one kind of layer are.
pub(super) struct Source<'a> {
    /// The object with type, factor and the like, where there is one.
    pub table: Option<Section<'a>>,
    /// Whether it is about one kind of layer among several, or all.
    pub nested: bool,
    /// Defaults of the kind of layer.
    pub kind: Option<&'static Kind>,
    /// Whether the older spelling `type` is heeded.
    pub heeds_type: bool,
    /// A theta that stands before all others.
    pub theta: Option<f64>,
    /// A part that rotates which stands before all but the table's.
    pub partial: Option<f64>,
}

impl<'a> Source<'a> {
    /// One table, or none, for all layers.
    pub fn flat(table: Option<Section<'a>>) -> Self {
        Self {
            table,
            nested: false,
            kind: None,
            heeds_type: true,
            theta: None,
            partial: None,
        }
    }

    /// The table of one kind of layer.
    pub fn of_kind(table: Section<'a>, kind: Option<&'static Kind>) -> Self {
        Self {
            nested: true,
            kind,
            ..Self::flat(Some(table))
        }
    }
}

/// The only kind of layer of a model.
pub(super) fn read_flat(model: &Model<'_>) -> Result<RopeConfig, ConfigError> {
    read(model, &Source::flat(flat_table(&model.section)?))
}

/// `rope_scaling`, unless it is absent or empty, else `rope_parameters`.
pub(super) fn flat_table<'a>(section: &Section<'a>) -> Result<Option<Section<'a>>, ConfigError> {
    let old = section
        .section("rope_scaling")?
        .filter(|table| !table.is_empty());
    let new = section
        .section("rope_parameters")?
        .filter(|table| !table.is_empty());
    Ok(old.or(new))
}

pub(super) fn read(model: &Model<'_>, source: &Source<'_>) -> Result<RopeConfig, ConfigError> {
    let rope_type = rope_type(model, source)?;
    let (head_dim, head_dim_key) = head_dim(model, source)?;
    let section = &model.section;

    let (theta, theta_key) = theta(model, source)?;
    let mut config = RopeConfig::new(theta, head_dim).map_err(|error| {
        error
            .renamed("head_dim", &head_dim_key)
            .renamed("rope_theta", &theta_key)
    })?;

    let (partial, partial_key) = partial(model, source, rope_type, head_dim)?;
    let scaling = scaling(model, source, rope_type, partial)?;
    let plain = matches!(scaling, Scaling::None);
    let rotary_dim = match (model.family.head_dim, &scaling) {
        (HeadDim::Latent { .. }, _) | (_, Scaling::Proportional(_)) => head_dim,
        _ if matches!(model.family.axes, DefaultAxes::VisionThirds) => head_dim / 6 * 6,
        (HeadDim::AnyName, _) if section.has("qk_rope_head_dim") => head_dim,
        (HeadDim::RotaryDim(default), _) => section.count("rotary_dim")?.unwrap_or(default),
        _ if plain && !model.family.plain_heeds_partial => head_dim,
        _ => match partial {
            Some(partial) => (head_dim as f64 * partial) as usize,
            None if model.family.heeds_rotary_dim => {
                section.count("rotary_dim")?.unwrap_or(head_dim)
            }
            None => head_dim,
        },
    };
    let beside = section.count("rotary_dim")?;
    if let (HeadDim::AnyName, Some(part), Some(dims)) = (model.family.head_dim, partial, beside)
        && dims != rotary_dim
    {
        return Err(ConfigError::Conflict {
            first: partial_key,
            first_value: part.to_string(),
            second: section.key("rotary_dim"),
            second_value: dims.to_string(),
            remedy: format!("a head has {head_dim} dims; correct one of them"),
        });
    }
    let rotary_key = match partial {
        Some(_) if rotary_dim != head_dim => partial_key,
        _ if section.has("rotary_dim") => section.key("rotary_dim"),
        _ => head_dim_key,
    };
    config = config.with_rotary_dim(rotary_dim).map_err(|_| {
        let value = match section.shown(&rotary_key) {
            Some(value) => value,
            None => head_dim.to_string(),
        };
        let expected = format!(
            "such that an even number of dims rotates, at least 2 and at most all: {rotary_dim} of \
             {head_dim} would"
        );
        ConfigError::invalid(&rotary_key, value, expected)
    })?;
    let table_path = source.table.as_ref().map_or(section.path(), Section::path);
    let named = |error: ConfigError| match &error {
        ConfigError::Invalid { key, .. } if key == "rope_theta" => {
            error.renamed("rope_theta", &theta_key)
        }
        ConfigError::Invalid { key, .. } if key == "rotary_dim" => {
            error.renamed("rotary_dim", &rotary_key)
        }
        _ => error.within(table_path),
    };
    if model.family.trailing {
        config = config.with_trailing_rotation();
    }
    config = config
        .with_scaling(scaling)
        .map_err(named)?
        .with_direction(model.family.direction);
    config = with_pairing(model, config)?;
    if let Some(axes) = axes(model, source, rotary_dim)? {
        config = config.with_axes(axes);
    }
    let scale = score_scale(model, config.scaling(), head_dim)?;
    config = config.with_score_scale(scale)?;
    // Here it only informs: -1 and 1e30 stand for no limit.
    if let Some(tokens) = max_position_embeddings(section, Section::limit)? {
        config = config.with_max_position_embeddings(tokens);
    }
    config.check_all().map_err(named)
}

/// theta and the key it comes from.
fn theta(model: &Model<'_>, source: &Source<'_>) -> Result<(f64, String), ConfigError> {
    let section = &model.section;
    if let Some(theta) = source.theta {
        return Ok((theta, section.key("layer_rope_theta")));
    }
    if let Some(table) = &source.table
        && let Some(theta) = table.number("rope_theta")?
    {
        return Ok((theta, table.key("rope_theta")));
    }
    if let (Some(table), Some((keys, default))) = (&source.table, model.family.table_theta)
        && (source.nested || source.kind.is_none())
    {
        return Ok(match section.first_number(keys)? {
            Some((key, theta)) => (theta, section.key(key)),
            None => (default, table.key("rope_theta")),
        });
    }
    let keys = match source.kind {
        Some(kind) => kind.theta_keys,
        None if source.table.is_none() && !model.family.lone_theta => &[],
        None => model.family.theta_keys,
    };
    if let Some((key, theta)) = section.first_number(keys)? {
        return Ok((theta, section.key(key)));
    }
    let key = section.key(keys.first().unwrap_or(&"rope_theta"));
    let mut default = source.kind.map(|kind| kind.theta).or(model.family.theta);
    // ChatGLM's own spelling.
    if model.known_as == Some("chatglm")
        && let Some(ratio) = section.number("rope_ratio")?
    {
        default = default.map(|theta| theta * ratio);
    }
    match default {
        Some(theta) => Ok((theta, key)),
        None => Err(ConfigError::missing(
            key,
            format!(
                "give it (10000 is usual); {} has no known default",
                model.name()
            ),
        )),
    }
}

/// Keys that the config leaves out, with what the family has for them.
pub(super) fn assumed(model: &Model<'_>, kinds: &[(String, RopeConfig)]) -> Vec<(String, f64)> {
    let section = &model.section;
    let mut assumed = Vec::new();
    // A family that is not known has no defaults.
    if model.known_as.is_none() {
        return assumed;
    }
    let flat = Source::flat(flat_table(section).unwrap_or_default());
    // What kinds of layers have of their own is not assumed, and may be all that there is.
    let Ok((dim, key)) = head_dim(model, &flat) else {
        return assumed;
    };
    let hidden = model.family.hidden_keys.iter().any(|key| section.has(key));
    let heads = HEADS.iter().any(|key| section.has(key));
    let is_size = |size: &str| key == section.key(size);
    let derived = model
        .family
        .hidden_keys
        .iter()
        .chain(HEADS)
        .any(|size| is_size(size));
    let sizes = model.known_as.and_then(families::default_sizes);
    match sizes {
        Some(sizes) if derived && !heads => assumed.push((
            section.key("num_attention_heads"),
            sizes.num_attention_heads as f64,
        )),
        Some(sizes) if derived && !hidden => {
            assumed.push((
                section.key(model.family.hidden_keys[0]),
                sizes.hidden_size as f64,
            ));
        }
        _ if section.shown(&key).is_none() => assumed.push((key, dim as f64)),
        _ => {}
    }
    if let [(_, rope)] = kinds
        && model.family.kinds.is_empty()
        && !model.family.listed_per_layer
        && let Ok((theta, key)) = theta(model, &flat)
        && section.shown(&key).is_none()
        && theta == rope.theta()
    {
        assumed.push((key, theta));
    }
    assumed
}

/// Names of the number of heads.
const HEADS: &[&str] = &["num_attention_heads", "n_head", "n_heads", "num_heads"];

/// The dims of a head and the key they come from.
fn head_dim(model: &Model<'_>, source: &Source<'_>) -> Result<(usize, String), ConfigError> {
    let section = &model.section;
    let from = |key: &str, default: usize| -> Result<(usize, String), ConfigError> {
        Ok((section.count(key)?.unwrap_or(default), section.key(key)))
    };
    if let Some((key, default)) = source.kind.and_then(|kind| kind.head_dim) {
        return match per_layer_head_dim(section)? {
            Some(dim) if !section.has(key) => Ok((dim, section.key("per_layer_config"))),
            _ => from(key, default),
        };
    }
    match model.family.head_dim {
        HeadDim::Latent { rope, .. } => from("qk_rope_head_dim", rope),
        // (JetMoE's class has it under both names.)
        HeadDim::Key(key, default) => match section.count("head_dim")? {
            Some(dim) if !section.has(key) => Ok((dim, section.key("head_dim"))),
            _ => from(key, default),
        },
        HeadDim::AlwaysDerived(default) => derived_head_dim(model, default),
        // An explicit null asks for the derived one.
        HeadDim::Fixed(default) if !section.is_null("head_dim") => from("head_dim", default),
        HeadDim::AnyName => {
            for key in [
                "qk_rope_head_dim",
                "head_dim",
                "attention_head_dim",
                "kv_channels",
            ] {
                if let Some(dim) = section.count(key)? {
                    return Ok((dim, section.key(key)));
                }
            }
            derived_head_dim(model, 0)
        }
        HeadDim::Fixed(default) | HeadDim::Derived(default) | HeadDim::RotaryDim(default) => {
            match section.count("head_dim")? {
                Some(dim) => Ok((dim, section.key("head_dim"))),
                None => derived_head_dim(model, default),
            }
        }
    }
}

fn derived_head_dim(model: &Model<'_>, default: usize) -> Result<(usize, String), ConfigError> {
    let section = &model.section;
    let first = |keys: &[&'static str]| -> Result<Option<(&'static str, usize)>, ConfigError> {
        for key in keys {
            if let Some(count) = section.count(key)? {
                return Ok(Some((key, count)));
            }
        }
        Ok(None)
    };
    let hidden = first(model.family.hidden_keys)?;
    let heads = first(HEADS)?;
    let derives = !matches!(model.family.head_dim, HeadDim::RotaryDim(_));
    let sizes = model.known_as.and_then(families::default_sizes);
    let (hidden_key, heads_key) = (
        hidden.map_or(model.family.hidden_keys[0], |(key, _)| key),
        heads.map_or("num_attention_heads", |(key, _)| key),
    );
    let null = section.is_null("head_dim");
    if hidden.is_none() && heads.is_none() && default > 0 && derives && !null {
        return Ok((default, section.key("head_dim")));
    }
    // One without the other goes with the family's default, as does neither where a null asks for it.
    let beside = sizes.filter(|_| hidden.is_some() || heads.is_some() || null);
    let needed = |count: Option<usize>, key: &str| {
        count.ok_or_else(|| {
            ConfigError::missing(
                section.key("head_dim"),
                format!("give it, or {}", section.key(key)),
            )
        })
    };
    let of_hidden = hidden.map(|(_, count)| count);
    let of_heads = heads.map(|(_, count)| count);
    let hidden_size = needed(
        of_hidden.or(beside.map(|sizes| sizes.hidden_size)),
        hidden_key,
    )?;
    let head_count = needed(
        of_heads.or(beside.map(|sizes| sizes.num_attention_heads)),
        heads_key,
    )?;
    let dim = hidden_size / head_count;
    if dim == 0 {
        return Err(ConfigError::Conflict {
            first: section.key(hidden_key),
            first_value: hidden_size.to_string(),
            second: section.key(heads_key),
            second_value: head_count.to_string(),
            remedy: "a head would have no dims; correct one of them".to_string(),
        });
    }
    let key = if hidden.is_some() {
        hidden_key
    } else {
        heads_key
    };
    Ok((dim, section.key(key)))
}

/// transformers 5.23 saves a head_dim of some layers as an entry per layer.
fn per_layer_head_dim(section: &Section<'_>) -> Result<Option<usize>, ConfigError> {
    let Some(layers) = section.section("per_layer_config")? else {
        return Ok(None);
    };
    let mut found: Option<(String, usize)> = None;
    for (_, layer) in layers.sections() {
        let Some(dim) = layer.count("head_dim")? else {
            continue;
        };
        match &found {
            Some((key, other)) if *other != dim => {
                return Err(ConfigError::Conflict {
                    first: key.clone(),
                    first_value: other.to_string(),
                    second: layer.key("head_dim"),
                    second_value: dim.to_string(),
                    remedy: "layers of one kind need the same head_dim".to_string(),
                });
            }
            _ => found = Some((layer.key("head_dim"), dim)),
        }
    }
    Ok(found.map(|(_, dim)| dim))
}

/// The part of a head that rotates, and the key it comes from.
fn partial(
    model: &Model<'_>,
    source: &Source<'_>,
    rope_type: Option<&str>,
    head_dim: usize,
) -> Result<(Option<f64>, String), ConfigError> {
    let section = &model.section;
    let family = model.family;
    let in_table = match &source.table {
        // DeepSeek-V4's flat table has no say in it.
        Some(_) if family.kinds_by_window && !source.nested => None,
        Some(table) => table
            .number("partial_rotary_factor")?
            .map(|part| (part, table.key("partial_rotary_factor"))),
        None => None,
    };
    // Default tables that have a part of their own, and such as are not looked beside.
    let settled = match source.kind {
        Some(kind) => !source.nested && kind.partial != 1.0 && !family.kinds_by_window,
        None => source.table.is_none() && !family.lone_partial,
    };
    let keys = if settled { &[] } else { family.partial_keys };
    let given = match (in_table, source.partial) {
        (Some(given), _) => Some(given),
        (None, Some(part)) => Some((part, section.key("partial_rotary_factors"))),
        (None, None) => section
            .first_number(keys)?
            .map(|(key, part)| (part, section.key(key))),
    };
    // DeepSeek-V4's configs name the dims, as those of V3.
    let given = match given {
        None if family.trailing && !source.nested => {
            section.count("qk_rope_head_dim")?.map(|dims| {
                (
                    dims as f64 / head_dim as f64,
                    section.key("qk_rope_head_dim"),
                )
            })
        }
        given => given,
    };
    if let Some((part, key)) = given {
        fraction(&key, part)?;
        return Ok((Some(part), key));
    }
    // A table of its own replaces a kind's defaults as a whole.
    let default = match source.kind {
        // transformers takes one default for plain RoPE and another for scaled.
        Some(_)
            if source.nested
                && (family.kinds_by_window || family.partial != 1.0 && rope_type.is_some()) =>
        {
            return Err(ConfigError::missing(
                source
                    .table
                    .as_ref()
                    .unwrap_or(section)
                    .key("partial_rotary_factor"),
                "give the part of the head that rotates in each table",
            ));
        }
        Some(_) if source.nested => family.partial,
        Some(kind) => kind.partial,
        None if source.table.is_some() && !family.lone_partial => 1.0,
        None => family.partial,
    };
    let key = section.key(
        model
            .family
            .partial_keys
            .first()
            .unwrap_or(&"partial_rotary_factor"),
    );
    Ok(((default != 1.0).then_some(default), key))
}

fn rope_type<'a>(model: &Model<'a>, source: &Source<'a>) -> Result<Option<&'a str>, ConfigError> {
    let Some(table) = &source.table else {
        return Ok(None);
    };
    let mut key = "rope_type";
    let mut name = table.text(key)?;
    if name.is_none() && source.heeds_type {
        key = "type";
        name = table.text(key)?;
    }
    let Some(name) = name else {
        return Ok(None);
    };
    match name {
        "linear" | "dynamic" | "ntk_alpha" | "llama3" | "longrope" | "proportional" => {
            Ok(Some(name))
        }
        "su" => Ok(Some("longrope")),
        // Early Phi-3 configs say yarn and mean LongRoPE.
        "yarn" if is_phi3(model) => Ok(Some("longrope")),
        "yarn" => Ok(Some("yarn")),
        "default" | "mrope" => Ok(None),
        "axial" if is_vision(model.family) => Ok(None),
        other => Err(ConfigError::UnknownRopeType {
            key: table.key(key),
            value: format!("{:?}", crate::config::error::shortened(other)),
            known: KNOWN_TYPES,
        }),
    }
}

fn scaling(
    model: &Model<'_>,
    source: &Source<'_>,
    rope_type: Option<&str>,
    partial: Option<f64>,
) -> Result<Scaling, ConfigError> {
    let section = &model.section;
    let Some(table) = &source.table else {
        return default_scaling(model, source, partial);
    };
    let Some(rope_type) = rope_type else {
        return Ok(Scaling::None);
    };
    let factor = || -> Result<f64, ConfigError> {
        table.number("factor")?.ok_or_else(|| {
            ConfigError::missing(
                table.key("factor"),
                format!("rope type {rope_type:?} needs it"),
            )
        })
    };
    let max = || -> Result<u64, ConfigError> {
        let default = || {
            families::default_sizes(model.known_as?).and_then(|sizes| sizes.max_position_embeddings)
        };
        let given = max_position_embeddings(section, Section::tokens)?;
        given.or_else(default).ok_or_else(|| {
            ConfigError::missing(
                section.key("max_position_embeddings"),
                format!("rope type {rope_type:?} needs it"),
            )
        })
    };
    let original = || -> Result<u64, ConfigError> {
        let key = "original_max_position_embeddings";
        // In a table for all layers, the key beside the table wins.
        let beside = if source.nested || source.kind.is_some() {
            None
        } else {
            section.tokens(key)?.or(is_phi3(model).then_some(4096))
        };
        match beside {
            Some(tokens) => Ok(tokens),
            None => match table.tokens(key)? {
                Some(tokens) => Ok(tokens),
                None => max().map_err(|_| {
                    ConfigError::missing(
                        table.key(key),
                        format!("rope type {rope_type:?} needs it or max_position_embeddings"),
                    )
                }),
            },
        }
    };
    let factor_or_ratio = |original: u64| -> Result<f64, ConfigError> {
        match table.number("factor")? {
            Some(factor) => Ok(factor),
            None => Ok(max()? as f64 / original as f64),
        }
    };
    Ok(match rope_type {
        "linear" => Scaling::Linear(LinearScaling { factor: factor()? }),
        "ntk_alpha" => Scaling::NtkAlpha(NtkAlphaScaling {
            alpha: alpha(table)?.ok_or_else(|| {
                ConfigError::missing(table.key("alpha"), "rope type \"ntk_alpha\" needs it")
            })?,
        }),
        "dynamic" => match alpha(table)? {
            Some(alpha) => Scaling::NtkAlpha(NtkAlphaScaling { alpha }),
            None => Scaling::DynamicNtk(DynamicNtkScaling {
                factor: factor()?,
                max_position_embeddings: max()?,
            }),
        },
        "llama3" => {
            let needed = |key: &str| -> Result<f64, ConfigError> {
                table.number(key)?.ok_or_else(|| {
                    ConfigError::missing(table.key(key), "rope type \"llama3\" needs it")
                })
            };
            Scaling::Llama3(Llama3Scaling::new(
                factor()?,
                needed("low_freq_factor")?,
                needed("high_freq_factor")?,
                original()?,
            ))
        }
        "yarn" => {
            let original = original()?;
            let nested = source.nested || source.kind.is_some();
            let unit = source.kind.filter(|kind| kind.unit_attention).map(|_| 1.0);
            let beta = |key: &str, default: f64| -> Result<f64, ConfigError> {
                let given = table.number(key)?.filter(|&beta| beta != 0.0);
                Ok(given.unwrap_or(default))
            };
            Scaling::Yarn(YarnScaling {
                beta_fast: beta("beta_fast", 32.0)?,
                beta_slow: beta("beta_slow", 1.0)?,
                attention_factor: table.number("attention_factor")?.or(unit),
                mscale: table.number("mscale")?,
                mscale_all_dim: table.number("mscale_all_dim")?,
                // transformers looks for it beside tables per kind of layer, not in them.
                truncate: table.flag("truncate")?.unwrap_or(true) || nested,
                ..YarnScaling::new(factor_or_ratio(original)?, original)
            })
        }
        "longrope" => {
            let original = original()?;
            let list = |key: &str| -> Result<Vec<f64>, ConfigError> {
                table.numbers(key)?.ok_or_else(|| {
                    ConfigError::missing(table.key(key), "rope type \"longrope\" needs it")
                })
            };
            let attention_factor = table.number("attention_factor")?;
            let short_mscale = table.number("short_mscale")?;
            let long_mscale = table.number("long_mscale")?;
            let settled = attention_factor.is_some() || short_mscale.and(long_mscale).is_some();
            Scaling::LongRope(LongRopeScaling {
                factor: if settled {
                    table.number("factor")?
                } else {
                    Some(factor_or_ratio(original)?)
                },
                attention_factor,
                short_mscale,
                long_mscale,
                ..LongRopeScaling::new(list("short_factor")?, list("long_factor")?, original)
            })
        }
        _ => Scaling::Proportional(ProportionalScaling {
            rotated: partial.unwrap_or(1.0),
            factor: table.number("factor")?.unwrap_or(1.0),
        }),
    })
}

/// Families whose RoPE is plain or LongRoPE, with `original_max_position_embeddings` beside the
/// table or by default.
fn is_phi3(model: &Model<'_>) -> bool {
    let names = ["phi3", "phi4_multimodal"];
    model.known_as.is_some_and(|name| names.contains(&name))
}

/// HunYuan's `alpha`; 0 counts as absent.
fn alpha(table: &Section<'_>) -> Result<Option<f64>, ConfigError> {
    Ok(table.number("alpha")?.filter(|&alpha| alpha != 0.0))
}

/// What holds where a config has no table of RoPE parameters.
fn default_scaling(
    model: &Model<'_>,
    source: &Source<'_>,
    partial: Option<f64>,
) -> Result<Scaling, ConfigError> {
    if source.kind.is_some_and(|kind| kind.proportional) {
        return Ok(Scaling::Proportional(ProportionalScaling {
            rotated: partial.unwrap_or(1.0),
            factor: 1.0,
        }));
    }
    let mut scaling = model.family.scaling.clone();
    let section = &model.section;
    if model.known_as == Some("qwen") && section.flag("use_dynamic_ntk")? != Some(false) {
        let seq_length = section.tokens("seq_length")?.ok_or_else(|| {
            ConfigError::missing(
                section.key("seq_length"),
                "give it, or use_dynamic_ntk as false: theta grows beyond that length",
            )
        })?;
        return Ok(Scaling::QwenNtk(QwenNtkScaling { seq_length }));
    }
    // A family's default table heeds the key beside it, as a given table does.
    if let Some(tokens) = model.section.tokens("original_max_position_embeddings")? {
        match &mut scaling {
            Scaling::Llama3(llama3) => llama3.original_max_position_embeddings = tokens,
            Scaling::Yarn(yarn) => yarn.original_max_position_embeddings = tokens,
            _ => {}
        }
    }
    Ok(scaling)
}

fn with_pairing(model: &Model<'_>, config: RopeConfig) -> Result<RopeConfig, ConfigError> {
    let section = &model.section;
    let family = model.family;
    if let Some(value) = section.flag("rope_interleave")? {
        let rule = PairingRule::Key {
            key: section.key("rope_interleave"),
            value,
        };
        return Ok(if value {
            config
                .with_pairing_by(Pairing::Interleaved, rule)
                .with_transformers_output_order(family.output_order)
        } else {
            config
                .with_pairing_by(Pairing::HalfSplit, rule)
                .with_transformers_output_order(OutputOrder::AsInput)
        });
    }
    let rule = match model.known_as {
        Some(name) => PairingRule::ModelType(name.to_string()),
        None => PairingRule::Assumed,
    };
    Ok(config
        .with_pairing_by(family.pairing, rule)
        .with_transformers_output_order(family.output_order))
}

fn axes(
    model: &Model<'_>,
    source: &Source<'_>,
    rotary_dim: usize,
) -> Result<Option<Axes>, ConfigError> {
    let (mut sections, mut interleaved) = (None, None);
    if let Some(table) = &source.table {
        sections = table.three("mrope_section")?;
        interleaved = table.flag("mrope_interleaved")?;
    }
    Ok(match model.family.axes {
        DefaultAxes::None => sections.map(|sections| {
            if interleaved == Some(true) {
                Axes::MropeInterleaved(sections)
            } else {
                Axes::MropeSections(sections)
            }
        }),
        DefaultAxes::MropeSections(_) if interleaved == Some(true) => {
            sections.map(Axes::MropeInterleaved)
        }
        DefaultAxes::MropeSections(default) => {
            Some(Axes::MropeSections(sections.unwrap_or(default)))
        }
        DefaultAxes::MropeInterleaved(default) => {
            Some(Axes::MropeInterleaved(sections.unwrap_or(default)))
        }
        DefaultAxes::Ernie(default) => Some(Axes::ErnieSections(sections.unwrap_or(default))),
        DefaultAxes::VisionHalves => Some(Axes::VisionHalves),
        DefaultAxes::Pixtral => Some(Axes::PixtralHalves),
        DefaultAxes::VisionThirds => Some(Axes::Video([rotary_dim / 3; 3])),
    })
}

fn score_scale(model: &Model<'_>, scaling: &Scaling, head_dim: usize) -> Result<f64, ConfigError> {
    let section = &model.section;
    let positive = |key: &str, default: f64| -> Result<f64, ConfigError> {
        match section.number(key)? {
            None => Ok(default),
            Some(number) if number > 0.0 => Ok(number),
            Some(_) => Err(section.invalid(key, "a positive number")),
        }
    };
    let of_dims = |dims: f64| dims.sqrt().recip();
    Ok(match model.family.score {
        // Latent attention by its keys.
        Score::HeadDim
            if matches!(model.family.head_dim, HeadDim::AnyName)
                && section.has("qk_rope_head_dim") =>
        {
            let nope = section.count("qk_nope_head_dim")?.unwrap_or(0);
            of_dims(nope as f64 + head_dim as f64) * latent_mscale(scaling)
        }
        Score::HeadDim => of_dims(head_dim as f64),
        Score::HalfHeadDim => of_dims(head_dim as f64 / 2.0),
        Score::One => 1.0,
        Score::QueryPreAttnScalar(default) => of_dims(positive("query_pre_attn_scalar", default)?),
        Score::QueryPreAttnScalarOrHeadDim => {
            of_dims(positive("query_pre_attn_scalar", head_dim as f64)?)
        }
        Score::AttentionMultiplier(default) => positive(
            "attention_multiplier",
            default.unwrap_or_else(|| of_dims(head_dim as f64)),
        )?,
        Score::Latent => {
            let nope = match model.family.head_dim {
                HeadDim::Latent { nope, .. } => section.count("qk_nope_head_dim")?.unwrap_or(nope),
                _ => 0,
            };
            of_dims(nope as f64 + head_dim as f64) * latent_mscale(scaling)
        }
    })
}

/// The square of YaRN's mscale over all dims, which DeepSeek's scores are multiplied with.
fn latent_mscale(scaling: &Scaling) -> f64 {
    match scaling {
        Scaling::Yarn(YarnScaling {
            factor,
            mscale_all_dim: Some(all_dim),
            ..
        }) => {
            let mscale = formulas::mscale(*factor, *all_dim);
            mscale.mul(mscale).to_f64()
        }
        _ => 1.0,
    }
}

/// The longest sequence under the first of its names that is there, as `read` understands it.
fn max_position_embeddings<'a>(
    section: &Section<'a>,
    read: impl Fn(&Section<'a>, &str) -> Result<Option<u64>, ConfigError>,
) -> Result<Option<u64>, ConfigError> {
    for key in [
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
    ] {
        if let Some(tokens) = read(section, key)? {
            return Ok(Some(tokens));
        }
    }
    Ok(None)
}
