//! What phasor reads from configs: one `config.json` a line from standard input, one JSON object a
//! line to standard output. `scripts/goldens/transformers-sweep.py` compares them with what
//! transformers makes of the same configs.

use std::io::{BufRead, Write};

use phasor::Frequencies;
use phasor::config::{ConfigError, ModelConfig, RopeConfig};
use serde_json::{Value, json};

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let said = match ModelConfig::from_hf_config(&line?) {
            Ok(model) => describe(&model),
            Err(error) => said(&error),
        };
        writeln!(out, "{said}")?;
    }
    Ok(())
}

fn said(error: &ConfigError) -> Value {
    let debug = format!("{error:?}");
    let kind: String = debug.chars().take_while(|c| c.is_alphanumeric()).collect();
    json!({"error": error.to_string(), "kind": kind})
}

/// Kinds of layers, and per layer the name of its kind, null for none.
fn describe(model: &ModelConfig) -> Value {
    let kinds: serde_json::Map<_, _> = model
        .layer_types()
        .into_iter()
        .filter_map(|name| Some((name.to_string(), rotation(model.rope_for(name).ok()?))))
        .collect();
    let mut layers = Vec::new();
    let unknown = loop {
        match model.rope_of_layer(layers.len()) {
            Ok(rope) => layers.push(rope.and_then(|rope| {
                let same = |name: &&str| model.rope_for(name).ok() == Some(rope);
                model
                    .layer_types()
                    .into_iter()
                    .find(same)
                    .map(str::to_string)
            })),
            Err(ConfigError::NoSuchLayer { .. }) => break None,
            Err(error) => break Some(error.to_string()),
        }
        // Without a number of layers there is no last one.
        if layers.len() == 1000 {
            break Some("no number of layers".to_string());
        }
    };
    let vision = match model.vision() {
        Ok(vision) => vision.map_or(Value::Null, rotation),
        Err(error) => said(&error),
    };
    json!({"kinds": kinds, "layers": layers, "layers_unknown": unknown, "vision": vision})
}

/// Radians per position of each pair, on whichever axis it turns.
fn of_pairs(frequencies: &Frequencies) -> Vec<f64> {
    let by_axis = frequencies.inv_freq();
    (0..frequencies.pairs())
        .map(|pair| by_axis.iter().skip(pair).step_by(frequencies.pairs()).sum())
        .collect()
}

fn rotation(config: &RopeConfig) -> Value {
    let lengths = [1u64, 1 << 20].map(|length| match config.frequencies_for_length(length) {
        Ok(frequencies) => json!({
            "inv_freq": of_pairs(&frequencies),
            "attention_factor": frequencies.attention_factor(),
        }),
        Err(error) => said(&error),
    });
    json!({
        "theta": config.theta(),
        "head_dim": config.head_dim(),
        "rotary_dim": config.rotary_dim(),
        "rotary_offset": config.rotary_offset(),
        "pairing": config.pairing().name(),
        "output_order": format!("{:?}", config.transformers_output_order()),
        "direction": format!("{:?}", config.direction()),
        "score_scale": config.score_scale(),
        "axes": config.axes().map(|axes| format!("{axes:?}")),
        "short": lengths[0],
        "long": lengths[1],
    })
}
