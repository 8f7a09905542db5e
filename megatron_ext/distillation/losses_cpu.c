// Statistics and gradients of rows of logits, one read for each; functions as in native.py.
//
// No -ffast-math: NaN must come out where NaN goes in. Products are arranged so that two equal
// models give zero although the compiler fuses multiplications and additions. Rows are dealt to
// threads. What is tested for every vector is the same for all of them, and predicted.

#include <math.h>

#include "vectors.h"

// Numbered as in losses_c.py.
enum { NONE, GAP, PRODUCTS };
enum { FORWARD_KL, REVERSE_KL, MSE, COSINE, JSD };
#define NAT 0.69314718f  // of a bit

static inline void store_f32(float *x, vec v) { memcpy(x, &v, sizeof v); }

static inline void store_bf16(bf16 *x, vec v) {  // to the nearest, ties to even
  uvec bits = (uvec)v;
  hvec h = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, hvec);
  memcpy(x, &h, sizeof h);
}

static inline vec splat(float x) {
  vec v = {0};
  return v + x;
}

static inline vec select(ivec mask, vec yes, vec no) {
  return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

static inline vec max(vec a, vec b) { return select(a > b, a, b); }

// 2^x for x <= 0, to a rounding or two; below -126 it is 2^-126.
static inline vec exp2_of(vec x) {
  vec floor = splat(-126);
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

// log2 x for normal x > 0, to a rounding or two; exactly 0 of 1.
static inline vec log2_of(vec x) {
  ivec bits = (ivec)x - 0x3f3504f3;  // of sqrt(1/2): the mantissa is from there to twice that
  vec exponent = __builtin_convertvector(bits >> 23, vec);
  vec m = (vec)((bits & 0x7fffff) + 0x3f3504f3);
  // log2 m = 2 / ln 2 (z + z^3 / 3 + ...), |z| < 0.172, cut off at 1e-9.
  vec z = (m - 1.0f) / (m + 1.0f), square = z * z;
  vec p = square * 0.32059890f + 0.41219858f;
  p = p * square + 0.57707802f;
  p = p * square + 0.96179669f;
  p = p * square + 2.88539008f;
  return p * z + exponent;
}

// log2 p_s - log2 m and log2 p_t - log2 m of d = log2 p_t - log2 p_s, from the likelier of the two:
// the other may be 0, and equal ones give zero.
static inline void against_mixture(vec d, float beta, vec *from_m, vec *t_from_m) {
  vec zero = {0}, positive = max(d, zero), negative = d - positive;
  vec likelier = select(d > zero, splat(beta), splat(1 - beta));
  vec other = select(d > zero, splat(1 - beta), splat(beta));
  vec below = zero - log2_of(likelier + other * exp2_of(negative - positive));
  *from_m = below - positive, *t_from_m = below + negative;
}

// p log p of x, the logit of p: 0 where p is exactly 0, whatever its logarithm. NaN stays NaN.
static inline vec unless_zero(vec x, vec term) {
  return select(x == splat(-INFINITY), splat(0), term);
}

static inline double sum(vec v) {
  double total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

#define KERNELS(T)                                                                                 \
  static inline vec load_tail_##T(const T *x, long count, const T *pad) {                          \
    T buffer[LANES];                                                                               \
    for (int i = 0; i < LANES; i++) buffer[i] = i < count ? x[i] : *pad;                           \
    return load_##T(buffer);                                                                       \
  }                                                                                                \
                                                                                                   \
  static inline vec load_some_##T(const T *x, long count, const T *pad) {                          \
    return count < LANES ? load_tail_##T(x, count, pad) : load_##T(x);                             \
  }                                                                                                \
                                                                                                   \
  static float row_max_##T(const T *x, long columns) {                                             \
    vec best = load_some_##T(x, columns, x);                                                       \
    for (long j = 0; j < columns; j += LANES)                                                      \
      best = max(load_some_##T(x + j, columns - j, x), best);                                      \
    float result = best[0];                                                                        \
    for (int i = 1; i < LANES; i++) result = best[i] > result ? best[i] : result;                  \
    return result;                                                                                 \
  }                                                                                                \
                                                                                                   \
  /* stats [4 + m, rows] */                                                                        \
  void row_stats_##T(const T *student, const T *teacher, long rows, long student_width,            \
                     long teacher_width, long columns, float scale, int threads, int moments,      \
                     float *stats) {                                                               \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long row = 0; row < rows; row++) {                                                        \
      const T *s = student + row * student_width, *t = teacher + row * teacher_width;              \
      float s_max = row_max_##T(s, columns), t_max = row_max_##T(t, columns);                      \
      double total[5] = {0};                                                                       \
      for (long j = 0; j < columns;) {                                                             \
        vec part[5] = {{0}};                                                                       \
        for (int i = 0; i < BLOCK && j < columns; i++, j += LANES) {                               \
          vec mask = splat(1);                                                                     \
          vec a = load_some_##T(s + j, columns - j, s) - s_max;                                    \
          vec b = load_some_##T(t + j, columns - j, t) - t_max;                                    \
          if (columns - j < LANES)                                                                 \
            for (int k = 0; k < LANES; k++) mask[k] = j + k < columns;                             \
          vec p_s = exp2_of(a * scale) * mask, p_t = exp2_of(b * scale) * mask;                    \
          part[0] += p_s, part[1] += p_t;                                                          \
          if (moments == GAP) part[2] += unless_zero(b, p_t * ((b - a) * scale));                  \
          if (moments == PRODUCTS)                                                                 \
            part[2] += p_s * p_s, part[3] += p_t * p_t, part[4] += p_s * p_t;                      \
        }                                                                                          \
        for (int k = 0; k < 5; k++) total[k] += sum(part[k]);                                      \
      }                                                                                            \
      stats[row] = s_max, stats[rows + row] = t_max;                                               \
      int count = moments == NONE ? 2 : moments == GAP ? 3 : 5;                                    \
      for (int k = 0; k < count; k++) stats[(2 + k) * rows + row] = total[k];                      \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  /* known [4, rows]; sums [2, rows] */                                                            \
  void mixture_sums_##T(const T *student, const T *teacher, long rows, long student_width,         \
                        long teacher_width, long columns, float scale, int threads,                \
                        const float *known, float beta, float *sums) {                             \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long row = 0; row < rows; row++) {                                                        \
      const T *s = student + row * student_width, *t = teacher + row * teacher_width;              \
      float s_max = known[row], t_max = known[rows + row];                                         \
      float s_sum = known[2 * rows + row], t_sum = known[3 * rows + row];                          \
      float shift = log2(s_sum) - log2(t_sum);                                                     \
      double s_total = 0, t_total = 0;                                                             \
      for (long j = 0; j < columns;) {                                                             \
        vec s_part = {0}, t_part = {0}, from_m, t_from_m;                                          \
        for (int i = 0; i < BLOCK && j < columns; i++, j += LANES) {                               \
          vec mask = splat(1);                                                                     \
          vec a = load_some_##T(s + j, columns - j, s) - s_max;                                    \
          vec b = load_some_##T(t + j, columns - j, t) - t_max;                                    \
          if (columns - j < LANES)                                                                 \
            for (int k = 0; k < LANES; k++) mask[k] = j + k < columns;                             \
          against_mixture((b - a) * scale + shift, beta, &from_m, &t_from_m);                      \
          s_part += unless_zero(a, exp2_of(a * scale) * from_m * mask);                            \
          t_part += unless_zero(b, exp2_of(b * scale) * t_from_m * mask);                          \
        }                                                                                          \
        s_total += sum(s_part), t_total += sum(t_part);                                            \
      }                                                                                            \
      sums[row] = s_total / s_sum * NAT, sums[rows + row] = t_total / t_sum * NAT;                 \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  /* known [k, rows]; factor [rows]; gradient as student */                                        \
  void gradient_##T(const T *student, const T *teacher, long rows, long student_width,             \
                    long teacher_width, long columns, float scale, int threads, int loss,          \
                    const float *known, const float *factor, float beta, T *gradient) {            \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long row = 0; row < rows; row++) {                                                        \
      const T *s = student + row * student_width, *t = teacher + row * teacher_width;              \
      T *g = gradient + row * student_width;                                                       \
      float s_max = known[row], t_max = known[rows + row];                                         \
      double s_sum = known[2 * rows + row], t_sum = known[3 * rows + row];                         \
      float row_factor = factor[row] / s_sum, ratio = s_sum / t_sum, inverse = 1 / s_sum;          \
      float shift = log2(s_sum) - log2(t_sum);                                                     \
      float fourth = loss == FORWARD_KL ? 0 : known[4 * rows + row];                               \
      float inverse_norms = loss == COSINE ? 1 / known[5 * rows + row] : 0;                        \
      for (long j = 0; j < columns; j += LANES) {                                                  \
        long count = columns - j;                                                                  \
        vec a = load_some_##T(s + j, count, s) - s_max, p_s = exp2_of(a * scale);                  \
        vec b = load_some_##T(t + j, count, t) - t_max, p_t = {0}, slope, from_m, t_from_m;        \
        if (loss != REVERSE_KL && loss != JSD) p_t = exp2_of(b * scale) * ratio;                   \
        if (loss == FORWARD_KL) {                                                                  \
          slope = p_s - p_t;                                                                       \
        } else if (loss == REVERSE_KL) {                                                           \
          slope = p_s * (((a - b) * scale - fourth) * NAT);                                        \
        } else if (loss == MSE) {                                                                  \
          slope = p_s * (2 * ((p_s - p_t) * inverse - fourth));                                    \
        } else if (loss == COSINE) {                                                               \
          slope = p_s * ((p_s * fourth - p_t * inverse_norms) * inverse);                          \
        } else {                                                                                   \
          against_mixture((b - a) * scale + shift, beta, &from_m, &t_from_m);                      \
          slope = p_s * ((1 - beta) * (from_m * NAT - fourth));                                    \
        }                                                                                          \
        T buffer[LANES];                                                                           \
        store_##T(buffer, slope * row_factor);                                                     \
        if (count < LANES)                                                                         \
          memcpy(g + j, buffer, count * sizeof(T));                                                \
        else                                                                                       \
          memcpy(g + j, buffer, sizeof buffer);                                                    \
      }                                                                                            \
      memset(g + columns, 0, (student_width - columns) * sizeof(T));                               \
    }                                                                                              \
  }

KERNELS(f32)
KERNELS(bf16)
