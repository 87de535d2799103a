// Reports how the device compiler laid out the structs of a call, so that the host can hold its own
// layout against it: of each struct its size, then the offsets of its fields.
#if defined(__CUDACC_RTC__)
// NVRTC ships no <stddef.h>.
#define offsetof(type, member) ((uint64_t)&((type*)0)->member)
#else
#include <stddef.h>
#endif

#include "phasor_call.h"

template <class Struct>
struct Layout;

#define PHASOR_OFFSET_OF_FIELD(type, name) offsetof(Self, name),
#define PHASOR_LAYOUT_OF(name)                                                          \
    template <>                                                                         \
    struct Layout<name> {                                                               \
        using Self = name;                                                              \
        static __device__ uint64_t* report(uint64_t* out) {                             \
            const uint64_t values[] = {sizeof(Self),                                    \
                                       PHASOR_FIELDS_##name(PHASOR_OFFSET_OF_FIELD)};   \
            for (const uint64_t value : values) *out++ = value;                         \
            return out;                                                                 \
        }                                                                               \
    };
PHASOR_STRUCTS(PHASOR_LAYOUT_OF)

#define PHASOR_REPORT(name) out = Layout<name>::report(out);
extern "C" __global__ void phasor_call_layout(uint64_t* out) { PHASOR_STRUCTS(PHASOR_REPORT) }
