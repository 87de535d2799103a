//! Which kinds of layers there are, and of which kind each layer is.

use std::collections::BTreeSet;

use super::Model;
use super::parameters::{self, Source};
use super::section::{Section, as_text, whole};
use super::unread;
use crate::config::error::shortened;
use crate::config::families::{Kind, Nope, Pattern, Switch, TELL_ATTENTION};
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
const COMPRESSED: &str = "compressed_sparse_attention";

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
        check_no_tables_beside(model)?;
    }
    unread::check(model, flat.as_ref())?;

    let mut kinds = Kinds::new();
    let mut rule = None;
    if !model.family.kinds.is_empty() {
        kinds = family_kinds(model, types.as_deref())?;
    } else if let Some(nested) = nested {
        check_nested(nested)?;
        for (name, table) in nested.sections() {
            let rope = parameters::read(model, &Source::of_kind(table, None))?;
            kinds.push((name.to_string(), rope));
        }
    } else if model.family.listed_per_layer {
        kinds = listed_kinds(model, types.as_deref(), &rotating)?;
    } else if let Some(thetas) = by_theta(model)? {
        let listed = theta_kinds(model, flat.clone(), &thetas, &mut kinds)?;
        rule = Some(LayerRule::Listed(listed));
    } else {
        let rope = parameters::read_flat(model)?;
        for name in rotating_types(model, types.as_deref(), &rotating)? {
            kinds.push((name, rope.clone()));
        }
    }
    let mut rule = match rule {
        Some(rule) => rule,
        None => {
            let types = types.as_deref();
            check_types(model, &kinds, types, &rotating, nested)?;
            layer_rule(model, &kinds, types, rotating)
        }
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

/// `layer_rope_theta`, where its entries are thetas and not only switches.
fn by_theta(model: &Model<'_>) -> Result<Option<Vec<f64>>, ConfigError> {
    match model.family.nope {
        Nope::Zeros(_) => Ok(None),
        _ => model.section.numbers("layer_rope_theta"),
    }
}

/// Kinds of layers of a family in which theta and the part that rotates are lists with an entry for
/// each layer.
fn listed_kinds(
    model: &Model<'_>,
    types: Option<&[String]>,
    rotating: &Rotating,
) -> Result<Kinds, ConfigError> {
    let section = &model.section;
    // Neither is read by transformers; other values than these mean another rotation.
    let scaled_types = section.list("yarn_only_types", "strings", as_text)?;
    if section.has("rope_scaling") && scaled_types.is_some_and(|types| types != [FULL]) {
        return Err(section.invalid("yarn_only_types", "[\"full_attention\"] or absent"));
    }
    let rotates = section.list(
        "use_rope_layers",
        "true or false",
        serde_json::Value::as_bool,
    )?;
    if rotates.is_some_and(|rotates| rotates.contains(&false)) {
        return Err(section.invalid("use_rope_layers", "true for each layer, or absent"));
    }
    if let Some(table) = section.section("rope_parameters")?
        && !table.is_empty()
    {
        return Err(section.invalid(
            "rope_parameters",
            "an object of a table for each kind of layer",
        ));
    }
    let scaled = section.section("rope_scaling")?;
    let mut kinds = Kinds::new();
    for name in rotating_types(model, types, rotating)? {
        let table = scaled.clone().filter(|_| name == FULL);
        let in_table = match &table {
            Some(table) => table.has("rope_theta"),
            None => false,
        };
        let theta = listed_number(section, "rope_theta", types, &name)?.or(model.family.theta);
        let source = Source {
            table,
            nested: true,
            heeds_type: false,
            theta: theta.filter(|_| !in_table),
            partial: listed_number(section, "partial_rotary_factors", types, &name)?.or(Some(1.0)),
            ..Source::flat(None)
        };
        kinds.push((name, parameters::read(model, &source)?));
    }
    Ok(kinds)
}

/// The number that a key lists for the layers of one type, or has for all.
fn listed_number(
    section: &Section<'_>,
    key: &str,
    types: Option<&[String]>,
    name: &str,
) -> Result<Option<f64>, ConfigError> {
    if !section.is_list(key) {
        return section.number(key);
    }
    let numbers = section.numbers(key)?.unwrap_or_default();
    let types = types.ok_or_else(|| {
        ConfigError::missing(
            section.key("num_hidden_layers"),
            format!(
                "give it, or layer_types: {} has an entry per layer",
                section.key(key)
            ),
        )
    })?;
    if numbers.len() < types.len() {
        let expected = format!("a number or a list of {}, one per layer", types.len());
        return Err(section.invalid(key, expected));
    }
    let mut of_type = (types.iter().zip(&numbers)).filter(|(other, _)| *other == name);
    let Some((_, &number)) = of_type.next() else {
        return Ok(None);
    };
    if of_type.any(|(_, &other)| other != number) {
        let expected = format!(
            "one number for all layers of the type {:?}",
            shortened(name)
        );
        return Err(section.invalid(key, expected));
    }
    Ok(Some(number))
}

/// Kinds of layers that the family has defaults for, as the config changes them.
fn family_kinds(model: &Model<'_>, types: Option<&[String]>) -> Result<Kinds, ConfigError> {
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
    // A flat table of the new spelling is as one of the old.
    if model.family.kinds_by_window
        && new.as_ref().is_some_and(|table| !is_nested(table))
        && old.is_none()
    {
        old = new.take();
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
    // Before what a table says is looked at, as it may be as wrong as that another is missing.
    let mut with_tables = Vec::new();
    for kind in model.family.kinds {
        let own = match &new {
            Some(table)
                if table.is_null(kind.layer_type)
                    && !model.family.fills_tables
                    && !model.family.kinds_by_window =>
            {
                continue;
            }
            Some(table) => table.section(kind.layer_type)?,
            None => None,
        };
        if let (Some(table), None) = (&new, &own)
            && !model.family.fills_tables
        {
            let named = |types: &[String]| types.iter().any(|name| name == kind.layer_type);
            if model.family.kinds_by_window || types.is_none_or(named) {
                return Err(no_table(table, kind.layer_type));
            }
            continue;
        }
        with_tables.push((kind, own));
    }
    let mut kinds = Kinds::new();
    for (kind, own) in with_tables {
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
                theta: default_theta(model, kind, new.is_some(), types)?,
                partial: None,
            },
        };
        kinds.push((
            kind.layer_type.to_string(),
            parameters::read(model, &source)?,
        ));
    }
    Ok(kinds)
}

/// theta of a kind of layer without a table of its own, where it stands before what a flat table
/// says.
fn default_theta(
    model: &Model<'_>,
    kind: &Kind,
    tables: bool,
    types: Option<&[String]>,
) -> Result<Option<f64>, ConfigError> {
    if model.family.kinds_by_window {
        let given = model.section.first_number(kind.theta_keys)?;
        return Ok(Some(given.map_or(kind.theta, |(_, theta)| theta)));
    }
    if model.family.listed_per_layer && !tables {
        return listed_number(&model.section, "rope_theta", types, kind.layer_type);
    }
    Ok(None)
}

/// What to say of a kind of layer that rotates and has no table among tables.
fn no_table(tables: &Section<'_>, layer_type: &str) -> ConfigError {
    ConfigError::missing(
        tables.key(&shortened(layer_type)),
        "there are tables of other kinds of layers: give one for this kind, or null if its layers do \
         not rotate",
    )
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
    let text = |value: &serde_json::Value| as_text(value).map(|name| today(name).to_string());
    let keys: &[&str] = match model.family.pattern {
        Pattern::Hybrid => &["layer_types", "layers_block_type"],
        Pattern::CrossAttentionIn(..) => &[],
        _ if model.known_as.is_none() => &["layer_types", "layers_block_type"],
        _ => &["layer_types"],
    };
    for key in keys {
        let Some(mut types) = section.list(key, "strings", text)? else {
            continue;
        };
        // Layers behind the last one predict further tokens.
        let padded = matches!(model.family.pattern, Pattern::CompressRatios(_))
            || model.family.listed_per_layer;
        if let (Some(count), true) = (count, padded) {
            types.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        }
        if let (Pattern::LastOfAndAlwaysLast(..), Some(last)) =
            (model.family.pattern, types.last_mut())
        {
            *last = FULL.to_string();
        }
        return Ok(Some(types));
    }
    if let Pattern::CompressRatios(key) = model.family.pattern
        && let Some(ratios) = section.list(key, "whole numbers", whole)?
    {
        let layers = count.unwrap_or(ratios.len() as u64);
        if (ratios.len() as u64) < layers {
            return Err(section.invalid(key, format!("a list of at least {layers}, one per layer")));
        }
        let name = |ratio: &u64| if *ratio == 0 { SLIDING } else { COMPRESSED };
        let types = ratios.iter().map(|ratio| name(ratio).to_string());
        return Ok(Some(types.take(layers as usize).collect()));
    }
    if let Pattern::Windows(key, _) = model.family.pattern
        && section.is_list(key)
    {
        let slides = |value: &serde_json::Value| {
            let slides = whole(value).map(|window| window > 0);
            slides.or(value.is_null().then_some(false))
        };
        let slide = section.list(key, "whole numbers or null", slides)?;
        let name = |slides: bool| if slides { SLIDING } else { FULL };
        return Ok(slide.map(|slide| slide.into_iter().map(|s| name(s).to_string()).collect()));
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
        Pattern::By(name) => {
            check_layer_count(section, count)?;
            Ok(Some(
                (0..count)
                    .map(|layer| name(layer, count).to_string())
                    .collect(),
            ))
        }
        Pattern::CompressRatios(_) => by(COMPRESSED, Box::new(|_| true), COMPRESSED),
        Pattern::Windows(_, period) => by(
            FULL,
            Box::new(move |layer| (layer + 1) % period == 0),
            SLIDING,
        ),
        Pattern::LastOf(key, default) => {
            let period = period(key, default)?;
            by(
                FULL,
                Box::new(move |layer| (layer + 1) % period == 0),
                SLIDING,
            )
        }
        Pattern::LastOfAndLast(key, default) | Pattern::LastOfAndAlwaysLast(key, default) => {
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
            // The last of fewer layers.
            let period = period.min(count);
            by(
                FULL,
                Box::new(move |layer| (layer + 1) % period == 0),
                LINEAR,
            )
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
            let given = section.list(key, "strings", as_text)?;
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

/// The name that transformers has today for a type of layer.
fn today(name: &str) -> &str {
    match name {
        "attention" => FULL,
        "mamba" => LINEAR,
        "deepseek_sparse_attention" | "qwen_sparse_attention" => "indexed_attention",
        other => other,
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
    if let Nope::Zeros(key) = model.family.nope {
        if let Some(thetas) = section.numbers(key)? {
            let rotates = |(layer, &theta): (usize, &f64)| {
                let name = types.and_then(|types| types.get(layer));
                theta != 0.0 && name.is_none_or(|name| attends(name))
            };
            return Ok(Rotating::Listed(
                thetas.iter().enumerate().map(rotates).collect(),
            ));
        }
        let Some(count) = count else {
            return Ok(Rotating::Unknown(section.key("num_hidden_layers")));
        };
        check_layer_count(section, count)?;
        let rotates = |layer: u64| {
            let name = types.and_then(|types| types.get(layer as usize));
            !(count - 1 - layer).is_multiple_of(4) && name.is_none_or(|name| attends(name))
        };
        return Ok(Rotating::Listed((0..count).map(rotates).collect()));
    }
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
        let alike = matches!(model.family.pattern, Pattern::Listed)
            && (model.known_as.is_some() || !TELL_ATTENTION.iter().any(|key| section.has(key)));
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
    let tables = section.section("rope_parameters")?;
    let has_table = tables.is_some_and(|tables| tables.sections().any(|(name, _)| name == FULL));
    let rotates = |(layer, name): (usize, &String)| {
        attends(name)
            && match model.family.nope {
                Nope::FullAttention => name != FULL,
                Nope::FullAttentionWithoutTable => name != FULL || has_table,
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
    let is_dense = |value: &serde_json::Value| as_text(value).map(|name| name == "dense");
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

/// Refuses types of layers of which it is not known how they rotate, where types matter.
fn check_types(
    model: &Model<'_>,
    kinds: &Kinds,
    types: Option<&[String]>,
    rotating: &Rotating,
    tables: Option<&Section<'_>>,
) -> Result<(), ConfigError> {
    let (Some(types), Rotating::Listed(rotates)) = (types, rotating) else {
        return Ok(());
    };
    let family = model.family;
    let by_type = matches!(
        family.nope,
        Nope::FullAttention
            | Nope::FullAttentionWithoutTable
            | Nope::FullAttentionBesideWindow
            | Nope::FullAttentionUnlessDense
    );
    let is_kind = |name: &str| kinds.iter().any(|(kind, _)| kind == name);
    let of_family = |name: &str| family.kinds.iter().any(|kind| kind.layer_type == name);
    let unknown = |layer: usize, expected: String| {
        let key = format!("{}[{layer}]", model.section.key("layer_types"));
        Err(ConfigError::invalid(
            key,
            format!("{:?}", types[layer]),
            expected,
        ))
    };
    // Tables may go by other names than the types of layers.
    let by_tables = tables.filter(|_| types.iter().any(|name| is_kind(name)));
    for (layer, name) in types.iter().enumerate() {
        if rotates.get(layer) != Some(&true) || family.kinds_by_window {
            continue;
        }
        if by_type && ![FULL, SLIDING].contains(&name.as_str()) {
            return unknown(layer, format!("{FULL:?} or {SLIDING:?}"));
        }
        if !family.kinds.is_empty() {
            if !of_family(name) {
                let names: Vec<_> = family.kinds.iter().map(|kind| kind.layer_type).collect();
                return unknown(layer, format!("one of {}", names.join(", ")));
            }
        } else if let Some(tables) = by_tables
            && !is_kind(name)
            && !tables.is_null(name)
        {
            return Err(no_table(tables, name));
        }
    }
    Ok(())
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
            | Nope::FullAttentionWithoutTable
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
