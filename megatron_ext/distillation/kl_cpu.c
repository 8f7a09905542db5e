// Forward KL over rows of logits, one pass for its statistics and one for its gradient.
//
// Vectors of 16 are GNU C's own, which any x86 or ARM compiler lowers to what the machine has. No
// -ffast-math: NaN must come out where NaN goes in. Products are arranged so that two equal models
// give zero although the compiler fuses multiplications and additions. Rows are dealt to threads.

#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

static inline vec load_f32(const float *x) {
  vec v;
  memcpy(&v, x, sizeof v);
  return v;
}

static inline vec load_bf16(const bf16 *x) {
  hvec h;
  memcpy(&h, x, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}

static inline void store_f32(float *x, vec v) { memcpy(x, &v, sizeof v); }

static inline void store_bf16(bf16 *x, vec v) {  // to the nearest, ties to even
  uvec bits = (uvec)v;
  hvec h = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, hvec);
  memcpy(x, &h, sizeof h);
}

static inline vec select(ivec mask, vec yes, vec no) {
  return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

static inline vec max(vec a, vec b) { return select(a > b, a, b); }

// 2^x for x <= 0, to a rounding or two; below -126 it is 2^-126.
static inline vec exp2_of(vec x) {
  vec floor = {0};
  floor -= 126;
  x = select(x < floor, floor, x);
  vec whole = (x + 12582912.f) - 12582912.f;  // the nearest integer
  vec f = x - whole;
  // The series of 2^f on [-1/2, 1/2], cut off at 5e-9.
  vec p = f * 1.5252734e-5f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * (vec)((__builtin_convertvector(whole, ivec) + 127) << 23);
}

static inline double sum(vec v) {
  double total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

static inline vec splat(float x) {
  vec v = {0};
  return v + x;
}

// Float sums of so many vectors go to a double: what is lost to rounding does not grow with a row.
#define BLOCK 64

#define KERNELS(T)                                                                                 \
  static inline vec load_tail_##T(const T *x, long count, const T *pad) {                          \
    T buffer[LANES];                                                                               \
    for (int i = 0; i < LANES; i++) buffer[i] = i < count ? x[i] : *pad;                           \
    return load_##T(buffer);                                                                       \
  }                                                                                                \
                                                                                                   \
  static float row_max_##T(const T *x, long columns) {                                             \
    vec best = load_tail_##T(x, columns, x);                                                       \
    long j = 0;                                                                                    \
    for (; j + LANES <= columns; j += LANES) best = max(load_##T(x + j), best);                    \
    if (j < columns) best = max(load_tail_##T(x + j, columns - j, x), best);                       \
    float result = best[0];                                                                        \
    for (int i = 1; i < LANES; i++) result = best[i] > result ? best[i] : result;                  \
    return result;                                                                                 \
  }                                                                                                \
                                                                                                   \
  /* stats [5, rows]: max s, max t, sum 2^s', sum 2^t', sum 2^t' (t' - s'), s' = (s - max) scale   \
   */                                                                                              \
  void kl_stats_##T(const T *student, const T *teacher, long rows, long student_width,             \
                    long teacher_width, long columns, float scale, float *stats, int threads) {    \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long row = 0; row < rows; row++) {                                                        \
      const T *s = student + row * student_width, *t = teacher + row * teacher_width;              \
      float s_max = row_max_##T(s, columns), t_max = row_max_##T(t, columns);                      \
      double s_sum = 0, t_sum = 0, dot = 0;                                                        \
      long j = 0;                                                                                  \
      while (j < columns) {                                                                        \
        vec s_part = {0}, t_part = {0}, dot_part = {0};                                            \
        for (int i = 0; i < BLOCK && j < columns; i++, j += LANES) {                               \
          vec mask = splat(1), a, b;                                                               \
          if (j + LANES <= columns) {                                                              \
            a = load_##T(s + j), b = load_##T(t + j);                                              \
          } else {                                                                                 \
            a = load_tail_##T(s + j, columns - j, s), b = load_tail_##T(t + j, columns - j, t);    \
            for (int k = 0; k < LANES; k++) mask[k] = j + k < columns;                             \
          }                                                                                        \
          a -= s_max, b -= t_max;                                                                  \
          vec weight = exp2_of(b * scale) * mask;                                                  \
          s_part += exp2_of(a * scale) * mask;                                                     \
          t_part += weight;                                                                        \
          dot_part += weight * ((b - a) * scale);                                                  \
        }                                                                                          \
        s_sum += sum(s_part), t_sum += sum(t_part), dot += sum(dot_part);                          \
      }                                                                                            \
      stats[row] = s_max, stats[rows + row] = t_max;                                               \
      stats[2 * rows + row] = s_sum, stats[3 * rows + row] = t_sum, stats[4 * rows + row] = dot;   \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  /* gradient = (2^s' / sum - 2^t' / sum) factor; known [4, rows]: max s, max t, sum s, sum t */   \
  void kl_gradient_##T(const T *student, const T *teacher, long rows, long student_width,          \
                       long teacher_width, long columns, float scale, const float *known,          \
                       const float *factor, T *gradient, int threads) {                            \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long row = 0; row < rows; row++) {                                                        \
      const T *s = student + row * student_width, *t = teacher + row * teacher_width;              \
      T *g = gradient + row * student_width;                                                       \
      float s_max = known[row], t_max = known[rows + row];                                         \
      float row_factor = (double)factor[row] / known[2 * rows + row];                              \
      float ratio = (double)known[2 * rows + row] / known[3 * rows + row];                         \
      long j = 0;                                                                                  \
      for (; j < columns; j += LANES) {                                                            \
        long count = columns - j;                                                                  \
        vec a = count < LANES ? load_tail_##T(s + j, count, s) : load_##T(s + j);                  \
        vec b = count < LANES ? load_tail_##T(t + j, count, t) : load_##T(t + j);                  \
        vec teacher_part = exp2_of((b - t_max) * scale) * ratio;                                   \
        vec result = (exp2_of((a - s_max) * scale) - teacher_part) * row_factor;                   \
        if (count < LANES) {                                                                       \
          T buffer[LANES];                                                                         \
          store_##T(buffer, result);                                                               \
          memcpy(g + j, buffer, count * sizeof(T));                                                \
        } else {                                                                                   \
          store_##T(g + j, result);                                                                \
        }                                                                                          \
      }                                                                                            \
      memset(g + columns, 0, (student_width - columns) * sizeof(T));                               \
    }                                                                                              \
  }

typedef float f32;
KERNELS(f32)
KERNELS(bf16)
