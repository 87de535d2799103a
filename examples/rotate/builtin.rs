//! The tour: real queries and keys, and what transformers makes of them.

use std::collections::HashMap;

use phasor::half::bf16;
use phasor::{Device, Dtype, Frequencies, Pairing, Positions, Rope};
use safetensors::SafeTensors;

use super::options::Options;
use super::plot::{self, Subject};
use super::progress::Progress;
use super::report::{Report, small, thousands};
use super::scores::{difference, largest, rotate_by_f32_angles, scores};
use super::tensors::{QueriesKeys, Rotation, Stored, Tensor};
use super::{Failure, Result, output, speed};

/// q and k of one layer for one sentence, before and after transformers rotated them, in both
/// pairings. scripts/make-smollm2-fixture.py says how it was made.
const FILE: &[u8] = include_bytes!("../data/smollm2-layer0.safetensors");

pub fn rotate(options: &Options, progress: &mut Progress<'_>) -> Result<String> {
    let fixture = Fixture::open()?;
    let start = options.start_position.unwrap_or(0);
    let tour = Tour {
        device: Device::from_name(options.device(), &[Dtype::F32, Dtype::Bf16])?,
        half_split: fixture.rope(Pairing::HalfSplit)?,
        interleaved: fixture.rope(Pairing::Interleaved)?,
        fixture,
        start,
    };

    let mut report = Report::default();
    tour.introduce(&mut report)?;
    tour.compare_with_transformers(&mut report)?;
    tour.compare_scores(&mut report)?;
    tour.measure(&mut report, options, progress)?;
    let rope = match options.pairing() {
        Pairing::HalfSplit => &tour.half_split,
        Pairing::Interleaved => &tour.interleaved,
    };
    let plotted = match &options.plot {
        Some(path) => {
            let drawn = tour.plot(rope, progress)?;
            drawn.report(&mut report);
            Some((path, drawn.svg))
        }
        None => None,
    };
    if let Some(path) = &options.output {
        let bytes = tour.rotated(rope, start)?.to_file()?;
        output::write(path, &bytes)?;
        output::report(&mut report, path, &bytes);
    }
    if let Some((path, svg)) = plotted {
        output::write(path, svg.as_bytes())?;
        output::report(&mut report, path, svg.as_bytes());
    }
    Ok(report.finish())
}

struct Fixture {
    file: SafeTensors<'static>,
    about: HashMap<String, String>,
    theta: f64,
    head_dim: usize,
}

impl Fixture {
    fn open() -> Result<Self> {
        let unreadable = |error| Failure(format!("the built-in file: {error}"));
        let file = SafeTensors::deserialize(FILE).map_err(unreadable)?;
        let (_, header) = SafeTensors::read_metadata(FILE).map_err(unreadable)?;
        let about = header.metadata().clone().unwrap_or_default();
        let number = |key: &str| -> Result<f64> {
            let number = about.get(key).and_then(|text| text.parse().ok());
            number.ok_or_else(|| Failure(format!("the built-in file has no {key}")))
        };
        let (theta, head_dim) = (number("rope_theta")?, number("head_dim")? as usize);
        Ok(Self {
            file,
            about,
            theta,
            head_dim,
        })
    }

    fn about(&self, key: &str) -> &str {
        self.about.get(key).map_or("not stated", String::as_str)
    }

    fn frequencies(&self) -> Result<Frequencies> {
        Ok(Frequencies::from_theta(self.theta, self.head_dim)?)
    }

    fn rope(&self, pairing: Pairing) -> Result<Rope> {
        Ok(Rope::new(self.frequencies()?, pairing))
    }

    /// q and k in the order of a pairing; `suffix` is empty or `_rotated`.
    fn tensors(&self, pairing: Pairing, suffix: &str) -> Result<QueriesKeys<f32>> {
        let read = |tensor: &str| {
            let name = format!("{tensor}_{}{suffix}", pairing.name());
            match Tensor::read(&self.file, &name)? {
                None => Err(Failure(format!("the built-in file has no {name}"))),
                found => Ok(found),
            }
        };
        Ok(QueriesKeys {
            q: read("q")?,
            k: read("k")?,
        })
    }
}

struct Tour {
    fixture: Fixture,
    device: Device,
    half_split: Rope,
    interleaved: Rope,
    /// Position of the first token.
    start: i64,
}

impl Tour {
    fn rotated(&self, rope: &Rope, start: i64) -> Result<QueriesKeys<f32>> {
        let tensors = self.fixture.tensors(rope.pairing(), "")?;
        let rotation = Rotation::leading(rope, Positions::start(start));
        tensors.rotated(&self.device, &rotation)
    }

    fn introduce(&self, report: &mut Report) -> Result<()> {
        let Self {
            fixture, device, ..
        } = self;
        let tensors = fixture.tensors(Pairing::HalfSplit, "")?;
        report.heading("Rotary position embedding of the queries and keys of a real model");
        report.field(
            "model",
            &format!(
                "{}, layer {}, theta {:?}",
                fixture.about("model"),
                fixture.about("layer"),
                fixture.theta
            ),
        );
        report.field("sentence", fixture.about("sentence"));
        report.field(
            "shapes",
            &format!("{}: tokens, heads, dims", tensors.shapes()),
        );
        report.field("positions", &format!("from {} on", thousands(self.start)));
        report.field("device", &device.to_string());
        report.field("because", device.reason());
        Ok(())
    }

    fn compare_with_transformers(&self, report: &mut Report) -> Result<()> {
        if self.start != 0 {
            report.heading("Not compared with transformers: its results are for positions from 0");
            return Ok(());
        }
        let mut table = vec![["", "f32", "bf16"].map(String::from)];
        let mut values = 0.0;
        let mut rounding = 0.0;
        for (name, rope) in [
            ("half-split", &self.half_split),
            ("interleaved", &self.interleaved),
        ] {
            let input = self.fixture.tensors(rope.pairing(), "")?;
            let expected = self.fixture.tensors(rope.pairing(), "_rotated")?;
            let rotation = Rotation::leading(rope, Positions::start(self.start));
            let in_bf16 = input.map(bf16::from_f32).rotated(&self.device, &rotation)?;
            table.push([
                name.to_string(),
                small(apart(&self.rotated(rope, self.start)?, &expected)),
                small(apart(&in_bf16, &expected)),
            ]);
            // The same in both pairings, which hold the same values in another order.
            values = largest(expected.elements().map(f64::from));
            rounding = apart(&expected.map(bf16::from_f32), &expected);
        }
        let versions = self.fixture.about("versions");
        let versions: HashMap<String, String> = serde_json::from_str(versions).unwrap_or_default();
        let version = versions.get("transformers").map_or("", String::as_str);
        report.heading(&format!(
            "Largest difference from what transformers {version} computes in f32"
        ));
        table.push([
            "transformers' own, rounded to bf16".to_string(),
            String::new(),
            small(rounding),
        ]);
        report.table(&table);
        report.note(&format!(
            "Values reach {values:.1}. In bf16 both the input and the result are rounded; the \
             last row is one such rounding alone."
        ));
        Ok(())
    }

    fn compare_scores(&self, report: &mut Report) -> Result<()> {
        // From position 0, where f32 angles are good, whatever the start: far out all positions
        // may be one f32 value, and shifting them further would change nothing.
        let unshifted = scores(&self.rotated(&self.half_split, 0)?);
        let interleaved = scores(&self.rotated(&self.interleaved, 0)?);
        let pairings = difference(&unshifted, &interleaved);

        let input = self.fixture.tensors(Pairing::HalfSplit, "")?;
        let by_f32_angles =
            |start| scores(&rotate_by_f32_angles(&input, self.fixture.theta, start));
        let unshifted_f32 = by_f32_angles(0);
        let shifts = [0, 1_000, 1_000_000];
        let (mut exact, mut in_f32) = ([0.0; 3], [0.0; 3]);
        for (i, shift) in shifts.into_iter().enumerate() {
            let start = self.start.wrapping_add(shift);
            let shifted = scores(&self.rotated(&self.half_split, start)?);
            exact[i] = difference(&shifted, &unshifted);
            in_f32[i] = difference(&by_f32_angles(start), &unshifted_f32);
        }

        report.heading("Attention scores q . k of all pairs of tokens, in all heads");
        report.table(&[
            ["largest score", &format!("{:.1}", largest(unshifted))],
            [
                "half-split against interleaved, largest difference",
                &small(pairings),
            ],
        ]);
        report.heading(
            "Largest change of a score when all positions shift alike: it should not change",
        );
        let row = |name: &str, cells: [String; 3]| {
            let [a, b, c] = cells;
            [name.to_string(), a, b, c]
        };
        report.table(&[
            row("shift", shifts.map(thousands)),
            row("phasor", exact.map(small)),
            row(
                "angles in f32, as transformers forms them",
                in_f32.map(small),
            ),
        ]);
        if self.start != 0 {
            report.note(&format!(
                "Beside the scores at positions from 0 on; shifted ones start at {} plus the shift.",
                self.start
            ));
        }
        Ok(())
    }

    fn plot(&self, rope: &Rope, progress: &mut Progress<'_>) -> Result<plot::Drawn> {
        let subject = Subject {
            device: &self.device,
            frequencies: &self.fixture.frequencies()?,
            pairing: rope.pairing(),
            rotary_offset: 0,
        };
        let tensors = self.fixture.tensors(rope.pairing(), "")?;
        plot::draw(&subject, &tensors, progress)
    }

    fn measure(
        &self,
        report: &mut Report,
        options: &Options,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let positions = Positions::start(self.start);
        let pairing = options.pairing();
        let llama = Rope::new(Frequencies::from_theta(500_000.0, 128)?, pairing);
        let rotation = Rotation::leading(&llama, positions);
        let large = speed::measure(options, &self.device, &llama_sized(), &rotation, progress)?;
        let sentence = self.fixture.tensors(pairing, "")?;
        let rope = self.fixture.rope(pairing)?;
        let rotation = Rotation::leading(&rope, positions);
        let small = speed::measure(options, &self.device, &sentence, &rotation, progress)?;
        let name = format!(
            "{} tokens of Llama 3 8B, bf16",
            thousands(LLAMA_TOKENS as u64)
        );
        let rows = [(name.as_str(), large), ("this sentence, f32", small)];
        speed::report(report, options, &self.device, &rows);
        Ok(())
    }
}

/// The largest difference between two rotations of the same tensors.
fn apart<A: Stored, B: Stored>(a: &QueriesKeys<A>, b: &QueriesKeys<B>) -> f64 {
    largest(
        a.elements()
            .zip(b.elements())
            .map(|(a, b)| f64::from(a.widen()) - f64::from(b.widen())),
    )
}

/// A prompt of some length; a debug build would be at it for a minute.
const LLAMA_TOKENS: usize = if cfg!(debug_assertions) { 32 } else { 2048 };

/// q of 32 heads and k of 8, 128 dims each. The values do not matter to the speed.
fn llama_sized() -> QueriesKeys<bf16> {
    let tensor = |heads: usize| {
        let shape = vec![LLAMA_TOKENS, heads, 128];
        let values =
            (0..LLAMA_TOKENS * heads * 128).map(|i| bf16::from_f32((i % 255) as f32 - 127.0));
        Some(Tensor {
            shape,
            data: values.collect(),
        })
    };
    QueriesKeys {
        q: tensor(32),
        k: tensor(8),
    }
}
