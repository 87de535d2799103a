//! The serving steps that are measured, from packed qkv to rotated q and a written cache, and what the host
//! makes of them: without a GPU.

use super::schedule::HEAD_DIM;
use ::phasor::half::bf16;
use ::phasor::half::slice::HalfFloatSliceExt;
use ::phasor::norm::HeadNorm;
use ::phasor::quantize::{Codes, ScaleForm};
use ::phasor::{
    CacheLayout, Dtype, Error, Frequencies, Host, KvCacheLayout, Layout, Memory, Pairing,
    Positions, PositionsIn, Problem, Rope, Slots, SlotsIn, StageWeights, Stages, Stored,
    StoredCodes,
};

/// Llama-3-8B's and Qwen3-8B's.
pub const SHAPE: &str = "32+8+8 heads of 128";
const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEADS: usize = Q_HEADS + 2 * KV_HEADS;
/// Slots of a page.
pub const PAGE: usize = 16;
/// Of elements of a token: q, k and v.
pub const QKV: usize = HEADS * HEAD_DIM;
pub const Q: usize = Q_HEADS * HEAD_DIM;
const KV: usize = 2 * KV_HEADS * HEAD_DIM;
const ELEMENT: usize = size_of::<bf16>();

pub const TOKENS: [usize; 5] = [1, 32, 256, 2048, 8192];

/// What lies between the projection and the attention of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// RMS norms of the heads of q and k come first.
    pub norms: bool,
    /// The cache holds e4m3 by a scale that the call brings, not bf16.
    pub codes: bool,
    pub queries: Queries,
}

/// Where the rotated queries go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queries {
    InPlace,
    Elsewhere,
    /// Elsewhere, as e4m3.
    Codes,
}

impl Step {
    /// All of them, those first that say most.
    pub fn all() -> impl Iterator<Item = Self> {
        use Queries::{Codes, Elsewhere, InPlace};
        [
            (false, false, InPlace),
            (false, false, Elsewhere),
            (true, false, InPlace),
            (true, false, Elsewhere),
            (true, true, InPlace),
            (true, true, Elsewhere),
            (false, true, InPlace),
            (false, true, Elsewhere),
            (false, true, Codes),
        ]
        .into_iter()
        .map(|(norms, codes, queries)| Self {
            norms,
            codes,
            queries,
        })
    }

    /// What it does, wherever q goes to in bf16.
    pub fn name(self) -> String {
        let norm = if self.norms { "norm, " } else { "" };
        let cache = if self.codes { "an e4m3" } else { "a bf16" };
        let q = match self.queries {
            Queries::Codes => ", q to e4m3",
            Queries::InPlace | Queries::Elsewhere => "",
        };
        format!("{norm}rotate, append to {cache} cache{q}")
    }

    /// Bytes of a token that are read as they are written, and those that are written as half as many.
    fn copied_and_narrowed(self) -> [usize; 2] {
        let [q, kv] = [Q, KV].map(|elements| elements * ELEMENT);
        match (self.codes, self.queries) {
            (false, _) => [q + kv, 0],
            (true, Queries::Codes) => [0, q + kv],
            (true, _) => [q, kv],
        }
    }

    /// Bytes that a call reads and writes of heads; ids and weights are a thousandth of that.
    pub fn bytes_read_and_written(self, tokens: usize) -> [usize; 2] {
        let [copied, narrowed] = self.copied_and_narrowed();
        [copied + narrowed, copied + narrowed / 2].map(|bytes| tokens * bytes)
    }

    /// All that it moves.
    pub fn bytes(self, tokens: usize) -> usize {
        self.bytes_read_and_written(tokens).iter().sum()
    }

    /// Bytes of the cache of keys, and of that of values, for a call of so many tokens.
    pub fn cache_bytes(self, tokens: usize) -> usize {
        let size = if self.codes { 1 } else { ELEMENT };
        pages(tokens) * PAGE * KV_HEADS * HEAD_DIM * size
    }

    pub fn problem(self, tokens: usize) -> Problem {
        let window = |range| Layout::packed_heads(1, tokens, HEADS, HEAD_DIM, range);
        let (keys, values) = (Q_HEADS..Q_HEADS + KV_HEADS, Q_HEADS + KV_HEADS..HEADS);
        let cache = CacheLayout::paged_nhd(pages(tokens), PAGE, KV_HEADS, HEAD_DIM);
        let mut caches = KvCacheLayout::separate(cache, cache);
        if self.codes {
            caches = caches.with_codes(self.stored_codes());
        }
        let mut problem = Problem::new(Dtype::Bf16)
            .k_to_cache(window(keys))
            .v_to_cache(window(values))
            .cache(caches);
        if self.norms {
            let norm = Stages::new().norm(HeadNorm::rms(1e-6));
            problem = problem.q_stages(norm).k_stages(norm);
        }
        let elsewhere = (
            window(0..Q_HEADS),
            Layout::tokens(tokens, Q_HEADS, HEAD_DIM),
        );
        match self.queries {
            Queries::InPlace => problem.q(window(0..Q_HEADS)).one_buffer(),
            Queries::Elsewhere => problem.q(elsewhere).packed(),
            Queries::Codes => problem.q(elsewhere).q_codes(self.stored_codes()).packed(),
        }
    }

    fn stored_codes(self) -> StoredCodes {
        // Where q is coded too, peers multiply by what they are given; otherwise they divide by it.
        let form = match self.queries {
            Queries::Codes => ScaleForm::Multiply,
            _ => ScaleForm::Divide,
        };
        StoredCodes::given(Codes::E4m3, form)
    }

    /// What codes are scaled by; all values have one then.
    pub fn scale(self) -> f32 {
        match self.queries {
            Queries::Codes => 1.0 / SCALE,
            _ => SCALE,
        }
    }

    /// The operands that it has of those that are there.
    pub fn operands<'a, M: Memory>(self, given: Operands<'a, M>) -> ::phasor::Step<'a, bf16, M> {
        let [mut q, mut k, mut v] = [(); 3].map(|()| StageWeights::new());
        if self.norms {
            let [of_q, of_k] = given.gamma;
            (q, k) = (q.norm(of_q), k.norm(of_k));
        }
        let [of_q, of_k, of_v] = given.scales;
        if self.codes {
            (k, v) = (k.scales(of_k), v.scales(of_v));
        }
        let step = ::phasor::Step::new(given.positions)
            .buffer(given.qkv)
            .k_cache(given.k_cache)
            .v_cache(given.v_cache)
            .slots(given.slots);
        let step = match self.queries {
            Queries::InPlace => step,
            Queries::Elsewhere => step.q_to(given.q),
            Queries::Codes => {
                q = q.scales(of_q);
                step.q_codes(given.q_codes)
            }
        };
        step.q_weights(q).k_weights(k).v_weights(v)
    }

    /// What the host makes of a call that finds these buffers.
    pub fn on_host(self, tokens: usize, mut written: Written) -> Result<Written, Error> {
        let rotator = Host::new().rotator(&rope()?);
        let plan = rotator.plan(&self.problem(tokens))?;
        let (positions, slots, gamma) = (positions(tokens), slots(tokens), gamma());
        let scale = [self.scale()];
        let [k_cache, v_cache] = &mut written.caches;
        let given = Operands {
            positions: Positions::per_token(&positions[..]),
            slots: Slots::mapping(&slots[..]),
            qkv: &mut written.qkv[..],
            q: (&mut written.q[..]).into(),
            q_codes: (&mut written.q_codes[..]).into(),
            k_cache: (&mut k_cache[..]).into(),
            v_cache: (&mut v_cache[..]).into(),
            gamma: [&gamma[..]; 2],
            scales: [&scale[..]; 3],
        };
        let stored = rotator.step(&plan, self.operands(given))?;
        assert_eq!(stored, Stored::All, "every token has a slot");
        Ok(written)
    }

    /// The buffers of a call before it.
    pub fn unwritten(self, tokens: usize) -> Written {
        let cache = self.cache_bytes(tokens);
        let room = |queries| match self.queries == queries {
            true => tokens * Q,
            false => 0,
        };
        Written {
            qkv: qkv(tokens),
            q: vec![bf16::ZERO; room(Queries::Elsewhere)],
            q_codes: vec![0; room(Queries::Codes)],
            caches: [vec![0; cache], vec![0; cache]],
        }
    }
}

/// The scale of codes: so that nothing measured is beyond what e4m3 has.
const SCALE: f32 = 0.01;

/// All that any of the steps needs.
pub struct Operands<'a, M: Memory> {
    pub positions: PositionsIn<M::Ids<'a>>,
    pub slots: SlotsIn<M::Ids<'a>>,
    pub qkv: M::Write<'a, bf16>,
    pub q: M::Fill<'a, bf16>,
    pub q_codes: M::Bytes<'a>,
    pub k_cache: M::Bytes<'a>,
    pub v_cache: M::Bytes<'a>,
    /// For q and k.
    pub gamma: [M::Read<'a, bf16>; 2],
    /// For q, k and v.
    pub scales: [M::Read<'a, f32>; 3],
}

/// All that a step may write. Where it has no use for one, that is empty.
#[derive(Clone)]
pub struct Written {
    pub qkv: Vec<bf16>,
    pub q: Vec<bf16>,
    pub q_codes: Vec<u8>,
    pub caches: [Vec<u8>; 2],
}

impl Written {
    /// Which of them has other bits.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        let have_same_bits = |a: &[bf16], b: &[bf16]| a.reinterpret_cast() == b.reinterpret_cast();
        [
            ("qkv", have_same_bits(&self.qkv, &other.qkv)),
            ("q", have_same_bits(&self.q, &other.q)),
            ("the codes of q", self.q_codes == other.q_codes),
            ("the cache of keys", self.caches[0] == other.caches[0]),
            ("the cache of values", self.caches[1] == other.caches[1]),
        ]
        .into_iter()
        .find_map(|(what, same)| (!same).then_some(what))
    }
}

pub fn rope() -> Result<Rope, Error> {
    let frequencies = Frequencies::from_theta(5e5, HEAD_DIM)?;
    Ok(Rope::new(frequencies, Pairing::HalfSplit))
}

fn pages(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

/// Values between -1 and 1, none of them 0.
pub fn qkv(tokens: usize) -> Vec<bf16> {
    // A prime number of them, so that no two tokens have the same.
    const PATTERN: usize = 65_521;
    let mut state = 1u32;
    let pattern: Vec<_> = (0..PATTERN)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32(((state >> 9) as f32 + 0.5) / (1 << 22) as f32 - 1.0)
        })
        .collect();
    pattern.into_iter().cycle().take(tokens * QKV).collect()
}

/// A position for each token.
pub fn positions(tokens: usize) -> Vec<i64> {
    (1000..1000 + tokens as i64).collect()
}

/// A slot for each token, in no order.
pub fn slots(tokens: usize) -> Vec<i64> {
    // A prime number that divides no number of slots here, so that all of them are visited.
    const STRIDE: usize = 5003;
    let all = pages(tokens) * PAGE;
    (0..tokens).map(|t| (t * STRIDE % all) as i64).collect()
}

/// What normed heads are multiplied by.
pub fn gamma() -> Vec<bf16> {
    (0..HEAD_DIM)
        .map(|i| bf16::from_f32(0.5 + i as f32 / HEAD_DIM as f32))
        .collect()
}
