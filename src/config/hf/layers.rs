//! Which kinds of layers there are, and of which kind each layer is.

use std::collections::BTreeSet;

use super::Model;
use super::parameters::{self, Source};
use super::section::{Section, whole};
use crate::config::families::{Nope, Pattern, Switch, TELL_ATTENTION};
use crate::config::model::{LayerRule, Layers};
use crate::config::{ConfigError, RopeConfig};

type Kinds = Vec<(String, RopeConfig)>;

/// More layers than any model has.
const MAX_LAYERS: u64 = 1 << 16;

/// More kinds of layers than any model has: each takes its time to form.
const MOST_KINDS: usize = 64;

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";
const LINEAR: &str = "linear_attention";
const CROSS: &str = "cross_attention";

pub(super) fn read(model: &Model<'_>) -> Result<(Kinds, Layers), ConfigError> {
    let section = &model.section;
    if !rotates_at_all(model)? {
        return Err(ConfigError::NoRotation {
            what: format!("{}, as it is configured here,", model.name()),
        });
    }
    let count = layer_count(section)?;
    let types = layer_types(model, count)?;
    let rotating = rotating(model, types.as_deref(), count)?;
    let flat = parameters::flat_table(section)?;
    let nested = flat.as_ref().filter(|table| is_nested(table));
    if nested.is_none() {
        parameters::check_keys_of_unknown(model)?;
        check_no_tables_beside(model)?;
    }

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
        for name in rotating_types(model, types.as_deref(), &rotating)? {
            kinds.push((name, rope.clone()));
        }
    }
    let mut rule = match rule {
        Some(rule) => rule,
        None => layer_rule(model, &kinds, types.as_deref(), rotating),
    };
    if by_interval(model) {
        drop_unused(&mut kinds, &mut rule);
    }
    if kinds.is_empty() {
        return Err(ConfigError::NoRotation {
            what: format!("{}, as it is configured here,", model.name()),
        });
    }
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

/// Refuses tables by kind of layer that `rope_scaling` would stand before.
fn check_no_tables_beside(model: &Model<'_>) -> Result<(), ConfigError> {
    let section = &model.section;
    let old = section.section("rope_scaling")?;
    let new = section.section("rope_parameters")?;
    match (old, new) {
        (Some(old), Some(new))
            if model.family.kinds.is_empty() && !old.is_empty() && is_nested(&new) =>
        {
            Err(one_of_two(&old, &new))
        }
        _ => Ok(()),
    }
}

fn one_of_two(old: &Section<'_>, new: &Section<'_>) -> ConfigError {
    ConfigError::Conflict {
        first: old.path().to_string(),
        first_value: "an object".to_string(),
        second: new.path().to_string(),
        second_value: "an object of tables".to_string(),
        remedy: "keep one of them".to_string(),
    }
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
    // Kinds that are not types of layers take either the one or the other.
    if let (Some(old), Some(new)) = (&old, &new)
        && model.family.kinds_by_window
    {
        return Err(one_of_two(old, new));
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
            Some(table) => {
                let over = old.clone().filter(|_| kind.scaled);
                let table = match over {
                    Some(over) => table.with_over(over),
                    None => table,
                };
                Source::of_kind(table, Some(kind))
            }
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
    let numbers = |key: &str| section.list(key, "whole numbers", whole);
    let by = |first: &'static str, test: Box<dyn Fn(u64) -> bool>, second: &'static str| {
        check_layer_count(section, count)?;
        let name = |layer| if test(layer) { first } else { second };
        Ok(Some(
            (0..count).map(|layer| name(layer).to_string()).collect(),
        ))
    };
    match model.family.pattern {
        Pattern::Listed | Pattern::Hybrid => Ok(None),
        // Without a window nothing slides.
        Pattern::LastOf(..)
            if matches!(model.family.nope, Nope::FullAttentionBesideWindow)
                && section.is_null("sliding_window") =>
        {
            by(FULL, Box::new(|_| true), SLIDING)
        }
        Pattern::All(name) => by(name, Box::new(|_| true), name),
        Pattern::LastOf(key, default) => {
            let period = period(key, default)?;
            by(
                FULL,
                Box::new(move |layer| (layer + 1) % period == 0),
                SLIDING,
            )
        }
        Pattern::LastOfAndLast(key, default) => {
            let period = period(key, default)?;
            let full = move |layer| (layer + 1) % period == 0 || layer + 1 == count;
            by(FULL, Box::new(full), SLIDING)
        }
        Pattern::FirstOf(key, default) => {
            let period = period(key, default)?;
            by(FULL, Box::new(move |layer| layer % period == 0), SLIDING)
        }
        Pattern::LastOfAndFirst(period) => {
            let full = move |layer| (layer + 1) % period == 0 || layer == 0;
            by(FULL, Box::new(full), SLIDING)
        }
        Pattern::AttentionLast(key, default) => {
            let period = period(key, default)?;
            by(
                FULL,
                Box::new(move |layer| (layer + 1) % period == 0),
                LINEAR,
            )
        }
        Pattern::AttentionLastOrOnly(period) => {
            let only = count < period;
            let full = move |layer| (layer + 1) % period == 0 || only && layer + 1 == count;
            by(FULL, Box::new(full), LINEAR)
        }
        Pattern::AttentionFirst(period) => {
            by(FULL, Box::new(move |layer| layer % period == 0), LINEAR)
        }
        Pattern::AttentionIn(key, else_all) => match numbers(key)? {
            Some(layers) => {
                let layers = BTreeSet::from_iter(layers);
                by(FULL, Box::new(move |layer| layers.contains(&layer)), LINEAR)
            }
            None if else_all => by(FULL, Box::new(|_| true), LINEAR),
            None => Ok(None),
        },
        Pattern::CrossAttentionIn(key, default) => {
            let layers = numbers(key)?.unwrap_or_else(|| default.to_vec());
            let layers = BTreeSet::from_iter(layers);
            by(CROSS, Box::new(move |layer| layers.contains(&layer)), FULL)
        }
        Pattern::Cycle(key, default) => {
            let given = section.list(key, "strings", serde_json::Value::as_str)?;
            let cycle: Vec<bool> = given
                .filter(|given| !given.is_empty())
                .unwrap_or_else(|| default.to_vec())
                .iter()
                .map(|&name| name == "attention")
                .collect();
            let attends = move |layer: u64| cycle[layer as usize % cycle.len()];
            by(SLIDING, Box::new(attends), LINEAR)
        }
        Pattern::AfterDense => {
            let dense = dense_in_front(section)?;
            let front = period("prefix_dense_sliding_window_pattern", 1)?;
            let behind = period("sliding_window_pattern", 4)?;
            let full = move |layer: u64| match layer.checked_sub(dense) {
                None => (layer + 1).is_multiple_of(front),
                Some(layer) => (layer + 1).is_multiple_of(behind),
            };
            by(FULL, Box::new(full), SLIDING)
        }
    }
}

/// How many layers in front are dense in a model of experts.
fn dense_in_front(section: &Section<'_>) -> Result<u64, ConfigError> {
    let key = "first_k_dense_replace";
    match section.number(key)? {
        None => Ok(0),
        Some(0.0) => Ok(0),
        Some(_) => Ok(section.tokens(key)?.unwrap_or(0)),
    }
}

fn check_layer_count(section: &Section<'_>, count: u64) -> Result<(), ConfigError> {
    if count <= MAX_LAYERS {
        return Ok(());
    }
    Err(section.invalid("num_hidden_layers", format!("at most {MAX_LAYERS}")))
}

/// Whether each layer rotates.
enum Rotating {
    All,
    Listed(Vec<bool>),
    /// The key would say it.
    Unknown(String),
}

fn rotating(
    model: &Model<'_>,
    types: Option<&[String]>,
    count: Option<u64>,
) -> Result<Rotating, ConfigError> {
    let section = &model.section;
    if by_interval(model) {
        let listed = types.map(|types| types.len() as u64);
        let Some(mut rotating) = by_interval_or_list(model, count.or(listed))? else {
            return Ok(Rotating::Unknown(section.key("num_hidden_layers")));
        };
        for (rotates, name) in rotating.iter_mut().zip(types.unwrap_or_default()) {
            *rotates = *rotates && attends(name);
        }
        return Ok(Rotating::Listed(rotating));
    }
    let Some(types) = types else {
        // Where layers differ, something must tell them apart.
        let alike = match (model.family.pattern, model.family.nope) {
            (
                Pattern::Listed,
                Nope::FullAttention
                | Nope::FullAttentionBesideWindow
                | Nope::FullAttentionUnlessDense,
            ) => false,
            (Pattern::Listed, _) => {
                model.known_as.is_some() || !TELL_ATTENTION.iter().any(|key| section.has(key))
            }
            _ => false,
        };
        return Ok(if alike {
            Rotating::All
        } else {
            Rotating::Unknown(section.key("layer_types"))
        });
    };
    let dense = match model.family.nope {
        Nope::FullAttentionUnlessDense => dense_layers(section, types.len())?,
        _ => Vec::new(),
    };
    let beside_window = !section.is_null("sliding_window");
    let rotates = |(layer, name): (usize, &String)| {
        attends(name)
            && match model.family.nope {
                Nope::FullAttention => name != FULL,
                Nope::FullAttentionBesideWindow => name != FULL || !beside_window,
                Nope::FullAttentionUnlessDense => {
                    name == SLIDING || dense.get(layer) == Some(&true)
                }
                _ => true,
            }
    };
    Ok(Rotating::Listed(
        types.iter().enumerate().map(rotates).collect(),
    ))
}

/// Whether `no_rope_layers` and the like say which layers rotate.
fn by_interval(model: &Model<'_>) -> bool {
    match model.family.nope {
        Nope::Interval => true,
        Nope::IntervalIfGiven => ["no_rope_layers", "no_rope_layer_interval"]
            .iter()
            .any(|key| model.section.has(key)),
        _ => false,
    }
}

/// Whether layers of a type are attention of the tokens among each other.
fn attends(name: &str) -> bool {
    !matches!(
        name,
        LINEAR | CROSS | "conv" | "mamba" | "mamba2" | "recurrent" | "mlp" | "moe"
    )
}

/// Command A's dense layers, as far as they rotate whatever their type.
fn dense_layers(section: &Section<'_>, count: usize) -> Result<Vec<bool>, ConfigError> {
    let period = section.tokens("prefix_dense_sliding_window_pattern")?;
    if period.unwrap_or(1) != 1 {
        return Ok(Vec::new());
    }
    let is_dense = |value: &serde_json::Value| value.as_str().map(|name| name == "dense");
    if let Some(dense) = section.list("mlp_layer_types", "strings", is_dense)? {
        return Ok(dense);
    }
    let dense = dense_in_front(section)?;
    Ok((0..count as u64).map(|layer| layer < dense).collect())
}

/// SmolLM3's and Llama 4's layers without rotation.
fn by_interval_or_list(
    model: &Model<'_>,
    count: Option<u64>,
) -> Result<Option<Vec<bool>>, ConfigError> {
    let section = &model.section;
    let known = model.known_as.is_some();
    // A family that is not known may as well list the layers by number.
    let read = |value: &serde_json::Value| match value {
        serde_json::Value::Bool(flag) => Some(*flag),
        other => whole(other)
            .filter(|&number| known || number <= 1)
            .map(|number| number != 0),
    };
    let listed = section.list("no_rope_layers", "1 or 0", read)?;
    if let Some(listed) = listed.filter(|listed| !listed.is_empty()) {
        if !known && count.is_some_and(|count| count != listed.len() as u64) {
            let expected = "a list with 1 or 0 for each layer";
            return Err(section.invalid("no_rope_layers", expected));
        }
        return Ok(Some(listed));
    }
    let interval = section.tokens("no_rope_layer_interval")?.unwrap_or(4);
    let Some(count) = count else {
        return Ok(None);
    };
    check_layer_count(section, count)?;
    Ok(Some(
        (0..count)
            .map(|layer| (layer + 1) % interval != 0)
            .collect(),
    ))
}

/// The types of layers that rotate, each once.
fn rotating_types(
    model: &Model<'_>,
    types: Option<&[String]>,
    rotating: &Rotating,
) -> Result<Vec<String>, ConfigError> {
    let Some(types) = types else {
        let name = match model.family.nope {
            Nope::FullAttention
            | Nope::FullAttentionBesideWindow
            | Nope::FullAttentionUnlessDense => SLIDING,
            _ => FULL,
        };
        return Ok(vec![name.to_string()]);
    };
    let mut found: Vec<String> = Vec::new();
    for (layer, name) in types.iter().enumerate() {
        let rotates = match rotating {
            Rotating::Listed(rotating) => rotating.get(layer) == Some(&true),
            _ => true,
        };
        if rotates && !found.contains(name) {
            if found.len() == MOST_KINDS {
                return Err(model.section.invalid(
                    "layer_types",
                    format!("a list of at most {MOST_KINDS} different strings"),
                ));
            }
            found.push(name.clone());
        }
    }
    Ok(found)
}

fn layer_rule(
    model: &Model<'_>,
    kinds: &Kinds,
    types: Option<&[String]>,
    rotating: Rotating,
) -> LayerRule {
    let rotating = match rotating {
        Rotating::All if kinds.len() == 1 => return LayerRule::All(0),
        Rotating::All => return LayerRule::Unknown(model.section.key("layer_types")),
        Rotating::Unknown(key) => return LayerRule::Unknown(key),
        Rotating::Listed(rotating) => rotating,
    };
    let kind_of = |(layer, rotates): (usize, bool)| {
        if !rotates {
            return None;
        }
        match types.and_then(|types| types.get(layer)) {
            Some(name) if model.family.kinds_by_window => Some(usize::from(name != SLIDING)),
            Some(name) => kinds.iter().position(|(kind, _)| kind == name),
            None => Some(0),
        }
    };
    let some_rotate = rotating.contains(&true);
    let listed: Vec<_> = rotating.into_iter().enumerate().map(kind_of).collect();
    // Tables may go by other names than the types of layers.
    if some_rotate && listed.iter().all(Option::is_none) {
        return LayerRule::Unknown(model.section.key("layer_types"));
    }
    LayerRule::Listed(listed)
}

/// Drops kinds that no layer refers to.
fn drop_unused(kinds: &mut Kinds, rule: &mut LayerRule) {
    let LayerRule::Listed(listed) = rule else {
        return;
    };
    let used: Vec<bool> = (0..kinds.len())
        .map(|kind| listed.contains(&Some(kind)))
        .collect();
    let mut place = 0;
    let places: Vec<usize> = used
        .iter()
        .map(|&used| {
            place += usize::from(used);
            place.saturating_sub(1)
        })
        .collect();
    for kind in listed.iter_mut().flatten() {
        *kind = places.get(*kind).copied().unwrap_or(0);
    }
    let mut used = used.into_iter();
    kinds.retain(|_| used.next() == Some(true));
}
