/// The tokens that Qwen2.5-Omni makes of a sound: `features` frames of its spectrogram, of 10 ms each,
/// without padding (the sum of `feature_attention_mask`). It halves them twice.
///
/// ```
/// // 3 seconds are 75 tokens.
/// assert_eq!(phasor::multimodal::qwen2_5_omni_audio_tokens(300), 75);
/// ```
pub fn qwen2_5_omni_audio_tokens(features: usize) -> usize {
    features.div_ceil(2) / 2
}

/// The tokens that Qwen3-Omni makes of a sound: `features` frames of its spectrogram, of 10 ms each,
/// without padding. Each whole second becomes 13 tokens; what is left is halved three times, rounded
/// up.
///
/// ```
/// // 2.5 seconds
/// assert_eq!(phasor::multimodal::qwen3_omni_audio_tokens(250), 13 + 13 + 7);
/// ```
pub fn qwen3_omni_audio_tokens(features: usize) -> usize {
    let (seconds, rest) = (features / 100, features % 100);
    seconds.saturating_mul(13) + rest.div_ceil(8)
}
