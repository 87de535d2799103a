//! The size of the last-level cache.

use std::sync::OnceLock;

/// Where the processor does not tell.
const ASSUMED: usize = 32 << 20;

/// Bytes of the last-level cache, as far as the processor tells.
pub(super) fn last_level() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    // Asking takes microseconds under a hypervisor.
    *BYTES.get_or_init(|| read().unwrap_or(ASSUMED))
}

#[cfg(target_arch = "x86_64")]
fn read() -> Option<usize> {
    use std::arch::x86_64::__cpuid_count;
    /// "Deterministic cache parameters" of Intel, and AMD's of the same form, a cache per subleaf.
    const LEAVES: [u32; 2] = [0x4, 0x8000_001d];
    /// More than any processor has.
    const CACHES: u32 = 16;
    // SAFETY: every x86-64 processor has the instruction. Newer compilers know that by themselves.
    #[allow(unused_unsafe)]
    let ask = |leaf, subleaf| unsafe { __cpuid_count(leaf, subleaf) };
    LEAVES
        .into_iter()
        .filter(|leaf| ask(leaf & 0x8000_0000, 0).eax >= *leaf)
        .flat_map(|leaf| {
            let caches = (0..CACHES).map(move |i| ask(leaf, i));
            caches.take_while(|cache| cache.eax & 0x1f != 0)
        })
        .map(|cache| {
            let field = |low: u32, bits: u32| (cache.ebx >> low & ((1 << bits) - 1)) as usize + 1;
            field(22, 10) * field(12, 10) * field(0, 12) * (cache.ecx as usize + 1)
        })
        .max()
}

#[cfg(not(target_arch = "x86_64"))]
fn read() -> Option<usize> {
    None
}
