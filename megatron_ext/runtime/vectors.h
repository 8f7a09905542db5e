// Vectors of 16 floats for the C files of this package, and how float32 and bfloat16 are read.
//
// They are GNU C's own, which any x86 or ARM compiler lowers to what the machine has.

#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef float f32;
typedef uint16_t bf16;

// Float sums of so many vectors go to a double: what is lost to rounding does not grow with a row.
#define BLOCK 64

static inline vec load_f32(const f32 *x) {
  vec v;
  memcpy(&v, x, sizeof v);
  return v;
}

static inline vec load_bf16(const bf16 *x) {
  hvec h;
  memcpy(&h, x, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}
