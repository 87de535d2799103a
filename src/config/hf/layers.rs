//! Which kinds of layers there are, and of which kind each layer is.

use super::Model;
use super::parameters::{self, Source};
use super::section::{Section, whole};
use crate::config::families::{Nope, Pattern, Switch};
use crate::config::model::{LayerRule, Layers};
use crate::config::{ConfigError, RopeConfig};

type Kinds = Vec<(String, RopeConfig)>;

/// More layers than any model has.
const MAX_LAYERS: u64 = 1 << 16;

/// More kinds of layers than any model has: each takes its time to form.
const MOST_KINDS: usize = 64;

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

pub(super) fn read(model: &Model<'_>) -> Result<(Kinds, Layers), ConfigError> {
    let section = &model.section;
    if !rotates_at_all(model)? {
        return Err(ConfigError::NoRotation {
            what: format!("{}, as it is configured here,", model.name()),
        });
    }
    let count = layer_count(section)?;
    let types = layer_types(model, count)?;
    let flat = parameters::flat_table(section)?;
    let nested = flat.as_ref().filter(|table| is_nested(table));

    let mut kinds = Kinds::new();
    let mut rule = None;
    if !model.family.kinds.is_empty() {
        kinds = family_kinds(model)?;
    } else if let Some(nested) = nested {
        check_nested(nested)?;
        for (name, table) in nested.sections() {
            let rope = parameters::read(model, &Source::of_kind(table, None))?;
            kinds.push((name.to_string(), rope));
        }
    } else if let Some(thetas) = section.numbers("layer_rope_theta")? {
        let listed = theta_kinds(model, flat, &thetas, &mut kinds)?;
        rule = Some(LayerRule::Listed(listed));
    } else {
        let rope = parameters::read_flat(model)?;
        for name in rotating_types(model, types.as_deref())? {
            kinds.push((name, rope.clone()));
        }
    }
    if kinds.is_empty() {
        return Err(ConfigError::NoRotation {
            what: format!("{}, as it is configured here,", model.name()),
        });
    }
    let rule = match rule {
        Some(rule) => rule,
        None => layer_rule(model, &kinds, types, count)?,
    };
    let count = match &rule {
        LayerRule::Listed(listed) => Some(listed.len() as u64),
        _ => count,
    };
    Ok((kinds, Layers { count, rule }))
}

/// Whether an object of RoPE parameters holds a table per kind of layer.
fn is_nested(table: &Section<'_>) -> bool {
    table.sections().next().is_some()
}

/// Refuses what would be passed over: a type beside the tables. (transformers may write the default
/// type there.)
fn check_nested(table: &Section<'_>) -> Result<(), ConfigError> {
    for key in ["rope_type", "type"] {
        if !matches!(table.text(key)?, None | Some("default")) {
            let expected = "inside the table of each kind of layer, not beside these tables";
            return Err(table.invalid(key, expected));
        }
    }
    if table.sections().nth(MOST_KINDS).is_some() {
        return Err(ConfigError::invalid(
            table.path(),
            "an object of more",
            format!("an object of at most {MOST_KINDS} tables"),
        ));
    }
    Ok(())
}

/// Kinds of layers that the family has defaults for, as the config changes them.
fn family_kinds(model: &Model<'_>) -> Result<Kinds, ConfigError> {
    let section = &model.section;
    let mut old = section
        .section("rope_scaling")?
        .filter(|table| !table.is_empty());
    let mut new = section
        .section("rope_parameters")?
        .filter(|table| !table.is_empty());
    if let Some(table) = &old
        && is_nested(table)
    {
        new = old.take();
    }
    let takes_old = model.family.kinds.iter().any(|kind| kind.scaled);
    let expects_tables = |key: &str| {
        let names: Vec<_> = model
            .family
            .kinds
            .iter()
            .map(|kind| kind.layer_type)
            .collect();
        let expected = format!(
            "rope_parameters with a table for each of {}",
            names.join(", ")
        );
        section.invalid(key, expected)
    };
    if old.is_some() && !takes_old {
        return Err(expects_tables("rope_scaling"));
    }
    if let Some(table) = &new
        && !is_nested(table)
    {
        return Err(expects_tables("rope_parameters"));
    }
    // Where a kind has no table of the new spelling, its type is settled as default, and only
    // rope_type can change that.
    let heeds_type = model.known_as == Some("deepseek_v4");
    let mut kinds = Kinds::new();
    for kind in model.family.kinds {
        let own = match &new {
            Some(table) if table.is_null(kind.layer_type) => continue,
            Some(table) => table.section(kind.layer_type)?,
            None => None,
        };
        let source = match own {
            Some(table) => Source::of_kind(table, Some(kind)),
            None => Source {
                table: old.clone().filter(|_| kind.scaled),
                nested: new.is_some(),
                kind: Some(kind),
                heeds_type,
                theta: None,
            },
        };
        kinds.push((
            kind.layer_type.to_string(),
            parameters::read(model, &source)?,
        ));
    }
    Ok(kinds)
}

/// A kind for each theta of `layer_rope_theta`, in which 0 stands for no rotation.
fn theta_kinds(
    model: &Model<'_>,
    table: Option<Section<'_>>,
    thetas: &[f64],
    kinds: &mut Kinds,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let mut listed = Vec::with_capacity(thetas.len());
    let mut seen: Vec<f64> = Vec::new();
    for &theta in thetas {
        if theta == 0.0 {
            listed.push(None);
            continue;
        }
        if let Some(kind) = seen.iter().position(|&other| other == theta) {
            listed.push(Some(kind));
            continue;
        }
        if seen.len() == MOST_KINDS {
            return Err(model.section.invalid(
                "layer_rope_theta",
                format!("a list of at most {MOST_KINDS} different numbers"),
            ));
        }
        let source = Source {
            theta: Some(theta),
            ..Source::flat(table.clone())
        };
        let rope = parameters::read(model, &source)?;
        listed.push(Some(kinds.len()));
        kinds.push((format!("rope_theta {theta}"), rope));
        seen.push(theta);
    }
    Ok(listed)
}

fn rotates_at_all(model: &Model<'_>) -> Result<bool, ConfigError> {
    let section = &model.section;
    Ok(match model.family.nope {
        Nope::Unless(key, Switch::True) => section.flag(key)? == Some(true),
        Nope::Unless(key, Switch::Text(value)) => section.text(key)? == Some(value),
        Nope::If(key) => section.flag(key)? != Some(true),
        _ => true,
    })
}

fn layer_count(section: &Section<'_>) -> Result<Option<u64>, ConfigError> {
    for key in ["num_hidden_layers", "n_layer", "n_layers", "num_layers"] {
        if let Some(count) = section.tokens(key)? {
            return Ok(Some(count));
        }
    }
    Ok(None)
}

/// The type of each layer, where the config or the family says so.
fn layer_types(model: &Model<'_>, count: Option<u64>) -> Result<Option<Vec<String>>, ConfigError> {
    let section = &model.section;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_string);
    for key in ["layer_types", "layers_block_type"] {
        if let Some(types) = section.list(key, "strings", text)? {
            return Ok(Some(types));
        }
    }
    let Some(count) = count else {
        return Ok(None);
    };
    let period = |key: &str, default: u64| -> Result<u64, ConfigError> {
        Ok(section.tokens(key)?.unwrap_or(default))
    };
    let full: Box<dyn Fn(u64) -> bool> = match model.family.pattern {
        Pattern::Listed => return Ok(None),
        // Without a window nothing slides.
        Pattern::LastOf(..)
            if matches!(model.family.nope, Nope::FullAttentionBesideWindow)
                && section.is_null("sliding_window") =>
        {
            Box::new(|_| true)
        }
        Pattern::All(name) => {
            check_layer_count(section, count)?;
            return Ok(Some(vec![name.to_string(); count as usize]));
        }
        Pattern::LastOf(key, default) => {
            let period = period(key, default)?;
            Box::new(move |layer| (layer + 1) % period == 0)
        }
        Pattern::LastOfAndLast(key, default) => {
            let period = period(key, default)?;
            Box::new(move |layer| (layer + 1) % period == 0 || layer + 1 == count)
        }
        Pattern::FirstOf(key, default) => {
            let period = period(key, default)?;
            Box::new(move |layer| layer % period == 0)
        }
        Pattern::LastOfAndFirst(period) => {
            Box::new(move |layer| (layer + 1) % period == 0 || layer == 0)
        }
    };
    check_layer_count(section, count)?;
    let name = |layer| if full(layer) { FULL } else { SLIDING };
    Ok(Some(
        (0..count).map(|layer| name(layer).to_string()).collect(),
    ))
}

fn check_layer_count(section: &Section<'_>, count: u64) -> Result<(), ConfigError> {
    if count <= MAX_LAYERS {
        return Ok(());
    }
    Err(section.invalid("num_hidden_layers", format!("at most {MAX_LAYERS}")))
}

/// Layers that are no attention, or attention without positions.
fn type_rotates(model: &Model<'_>, name: &str) -> Result<bool, ConfigError> {
    let section = &model.section;
    if matches!(
        name,
        "linear_attention" | "conv" | "mamba" | "mamba2" | "recurrent" | "mlp" | "moe"
    ) {
        return Ok(false);
    }
    Ok(match model.family.nope {
        Nope::FullAttention => name != FULL,
        Nope::FullAttentionBesideWindow => name != FULL || section.is_null("sliding_window"),
        _ => true,
    })
}

/// The types of layers that rotate, each once.
fn rotating_types(model: &Model<'_>, types: Option<&[String]>) -> Result<Vec<String>, ConfigError> {
    let mut rotating: Vec<String> = Vec::new();
    let Some(types) = types else {
        let name = match model.family.nope {
            Nope::FullAttention | Nope::FullAttentionBesideWindow => SLIDING,
            _ => FULL,
        };
        return Ok(vec![name.to_string()]);
    };
    for name in types {
        if type_rotates(model, name)? && !rotating.contains(name) {
            if rotating.len() == MOST_KINDS {
                return Err(model.section.invalid(
                    "layer_types",
                    format!("a list of at most {MOST_KINDS} different strings"),
                ));
            }
            rotating.push(name.clone());
        }
    }
    Ok(rotating)
}

fn layer_rule(
    model: &Model<'_>,
    kinds: &Kinds,
    types: Option<Vec<String>>,
    count: Option<u64>,
) -> Result<LayerRule, ConfigError> {
    if let Nope::Interval = model.family.nope
        && let Some(rule) = interval_rule(&model.section, types.as_deref(), kinds, count)?
    {
        return Ok(rule);
    }
    let Some(types) = types else {
        let alike = kinds.len() == 1
            && !matches!(
                model.family.nope,
                Nope::FullAttention | Nope::FullAttentionBesideWindow | Nope::Interval
            );
        return Ok(if alike {
            LayerRule::All(0)
        } else {
            LayerRule::Unknown
        });
    };
    let kind_of = |name: &String| -> Result<Option<usize>, ConfigError> {
        if model.family.kinds_by_window {
            return Ok(Some(usize::from(name != SLIDING)));
        }
        if !type_rotates(model, name)? {
            return Ok(None);
        }
        Ok(kinds.iter().position(|(kind, _)| kind == name))
    };
    let listed = types.iter().map(kind_of).collect::<Result<_, _>>()?;
    Ok(LayerRule::Listed(listed))
}

/// SmolLM3's and Llama 4's layers without rotation.
fn interval_rule(
    section: &Section<'_>,
    types: Option<&[String]>,
    kinds: &Kinds,
    count: Option<u64>,
) -> Result<Option<LayerRule>, ConfigError> {
    let read = |value: &serde_json::Value| match value {
        serde_json::Value::Bool(flag) => Some(*flag),
        other => whole(other).map(|number| number != 0),
    };
    let listed = section.list("no_rope_layers", "1 or 0", read)?;
    let rotates = match listed.filter(|listed| !listed.is_empty()) {
        Some(listed) => listed,
        None => {
            let interval = section.tokens("no_rope_layer_interval")?.unwrap_or(4);
            let Some(count) = count else {
                return Ok(None);
            };
            check_layer_count(section, count)?;
            (0..count)
                .map(|layer| (layer + 1) % interval != 0)
                .collect()
        }
    };
    let kind_of = |(layer, rotates): (usize, bool)| {
        let named = types
            .and_then(|types| types.get(layer))
            .and_then(|name| kinds.iter().position(|(kind, _)| kind == name));
        rotates.then_some(named.unwrap_or(0))
    };
    let listed = rotates.into_iter().enumerate().map(kind_of).collect();
    Ok(Some(LayerRule::Listed(listed)))
}
