// Sums of activations over the positions of each sample, in one read of them.
//
// No -ffast-math: NaN must come out where NaN goes in. A thread has some columns, or some rows of
// the cosines, and takes positions in their order: the number of threads changes no bit. So many
// positions as vectors of a row, BLOCK, are added in float before their sum goes to a double.

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

// Columns of one thread at a time: their float sums stay in its nearest cache.
#define TILE 1024
#define HEADS 16

static inline vec magnitude(vec x) { return (vec)((uvec)x & 0x7fffffff); }

static inline float sum(vec v) {
  vec8 a, b;
  memcpy(&a, &v, 32), memcpy(&b, (char *)&v + 32, 32);
  a += b;
  vec4 c, d;
  memcpy(&c, &a, 16), memcpy(&d, (char *)&a + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

// Add samples to the totals over samples: v = sums / count or sqrt(sums), then w v and w v^2.
// sums [batch, units], counts and weights [batch], totals [2, units], total_weight [1]
void add_samples(const double *sums, const double *counts, const double *weights, long batch,
                 long units, int squares, double *totals, double *total_weight) {
  for (long b = 0; b < batch; b++) {
    double weight = weights[b], scale = 1 / counts[b];
    for (long j = 0; j < units; j++) {
      double x = sums[b * units + j], v = squares ? sqrt(x) : x * scale;
      totals[j] += weight * v, totals[units + j] += weight * v * v;
    }
    *total_weight += weight;
  }
}

// The numbers of a sample's positions that take part. left_out [positions, batch], or NULL.
static long taking_part(const uint8_t *left_out, long positions, long batch, long b, long *found) {
  long count = 0;
  for (long s = 0; s < positions; s++)
    if (!left_out || !left_out[s * batch + b]) found[count++] = s;
  return count;
}

#define KERNELS(T)                                                                                 \
  static inline vec load_tail_##T(const T *x, long count) {                                        \
    T buffer[LANES] = {0};                                                                         \
    for (int i = 0; i < count; i++) buffer[i] = x[i];                                              \
    return load_##T(buffer);                                                                       \
  }                                                                                                \
                                                                                                   \
  static inline vec load_some_##T(const T *x, long count) {                                        \
    return count >= LANES ? load_##T(x) : load_tail_##T(x, count);                                 \
  }                                                                                                \
                                                                                                   \
  /* Add |x| or x^2 of count <= 4 rows to part [width]; four more will be needed next. */          \
  static inline void add_rows_##T(const T *const *rows, int count, long width, int squares,        \
                                  float *part) {                                                   \
    for (long j = 0; j < width; j += LANES) {                                                      \
      vec total = load_f32(part + j);                                                              \
      for (int i = 0; i < 4 && i < count; i++) {                                                   \
        vec x = load_some_##T(rows[i] + j, width - j);                                             \
        total += squares ? x * x : magnitude(x);                                                   \
        __builtin_prefetch(rows[i + 4] + j);                                                       \
      }                                                                                            \
      memcpy(part + j, &total, sizeof total);                                                      \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  /* out [batch, units]: sum over positions of |x|, or x^2; x [positions, batch, units], strided */\
  void unit_sums_##T(const T *x, long stride_s, long stride_b, const uint8_t *left_out,            \
                     long positions, long batch, long units, int squares, double *out,             \
                     int threads) {                                                                \
    long tiles = (units + TILE - 1) / TILE;                                                        \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long item = 0; item < batch * tiles; item++) {                                            \
      long b = item / tiles, first = item % tiles * TILE;                                          \
      long width = units - first < TILE ? units - first : TILE;                                    \
      const T *start = x + b * stride_b + first;                                                   \
      double *total = out + b * units + first;                                                     \
      long *found = malloc((positions + 1) * sizeof *found);                                       \
      long count = taking_part(left_out, positions, batch, b, found);                              \
      memset(total, 0, width * sizeof *total);                                                     \
      for (long s = 0; s < count; s += BLOCK) {                                                    \
        float part[TILE + LANES];                                                                  \
        memset(part, 0, (width + LANES) * sizeof *part);                                           \
        long end = count - s < BLOCK ? count : s + BLOCK;                                          \
        for (long i = s; i < end; i += 4) {                                                        \
          const T *rows[8];                                                                        \
          for (long k = 0; k < 8; k++)                                                             \
            rows[k] = start + found[i + k < count ? i + k : count - 1] * stride_s;                 \
          if (end - i >= 4)                                                                        \
            add_rows_##T(rows, 4, width, squares, part);                                           \
          else                                                                                     \
            add_rows_##T(rows, end - i, width, squares, part);                                     \
        }                                                                                          \
        for (long j = 0; j < width; j++) total[j] += part[j];                                      \
      }                                                                                            \
      free(found);                                                                                 \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  /* out [batch, heads]: sum over positions of a head's L2 norm, or its square; x [.., heads d] */ \
  void head_sums_##T(const T *x, long stride_s, long stride_b, const uint8_t *left_out,            \
                     long positions, long batch, long heads, long d, int squares, double *out,     \
                     int threads) {                                                                \
    long tiles = (heads + HEADS - 1) / HEADS;                                                      \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long item = 0; item < batch * tiles; item++) {                                            \
      long b = item / tiles, first = item % tiles * HEADS;                                         \
      long width = heads - first < HEADS ? heads - first : HEADS;                                  \
      const T *start = x + b * stride_b + first * d;                                               \
      double total[HEADS] = {0};                                                                   \
      for (long s = 0; s < positions; s++) {                                                       \
        if (left_out && left_out[s * batch + b]) continue;                                         \
        const T *row = start + s * stride_s;                                                       \
        for (long head = 0; head < width; head++, row += d) {                                      \
          vec squared = {0};                                                                       \
          for (long j = 0; j < d; j += LANES) {                                                    \
            __builtin_prefetch(row + j + 4 * stride_s);                                            \
            vec v = load_some_##T(row + j, d - j);                                                 \
            squared += v * v;                                                                      \
          }                                                                                        \
          float square = sum(squared);                                                             \
          total[head] += squares ? square : sqrtf(square);                                         \
        }                                                                                          \
      }                                                                                            \
      memcpy(out + b * heads + first, total, width * sizeof *total);                               \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  /* 1 - cos of two rows, in [0, 2] */                                                             \
  static double change_##T(const T *x, const T *y, long width) {                                   \
    double xx = 0, yy = 0, xy = 0;                                                                 \
    for (long j = 0; j < width;) {                                                                 \
      vec xx_part = {0}, yy_part = {0}, xy_part = {0};                                             \
      for (int i = 0; i < BLOCK && j < width; i++, j += LANES) {                                   \
        __builtin_prefetch(x + j + 4 * width), __builtin_prefetch(y + j + 4 * width);              \
        vec a = load_some_##T(x + j, width - j), b = load_some_##T(y + j, width - j);              \
        xx_part += a * a, yy_part += b * b, xy_part += a * b;                                      \
      }                                                                                            \
      xx += sum(xx_part), yy += sum(yy_part), xy += sum(xy_part);                                  \
    }                                                                                              \
    double lengths = sqrt(xx * yy); /* exactly xx of two equal rows */                             \
    double change = 1 - xy / (lengths < 1e-12 ? 1e-12 : lengths);                                  \
    return change < 0 ? 0 : change > 2 ? 2 : change; /* NaN is neither and stays */                \
  }                                                                                                \
                                                                                                   \
  /* out [batch]: sum over positions of 1 - cos(x, y); both [positions, batch, width], strided */  \
  void change_sums_##T(const T *x, long x_stride_s, long x_stride_b, const T *y, long y_stride_s,  \
                       long y_stride_b, const uint8_t *left_out, long positions, long batch,       \
                       long width, double *out, int threads) {                                     \
    double *changes = malloc((positions * batch + 1) * sizeof *changes);                           \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (long row = 0; row < positions * batch; row++) {                                           \
      long s = row / batch, b = row % batch;                                                       \
      const T *before = x + s * x_stride_s + b * x_stride_b;                                       \
      const T *after = y + s * y_stride_s + b * y_stride_b;                                        \
      int counts = !left_out || !left_out[row];                                                    \
      changes[row] = counts ? change_##T(before, after, width) : 0;                                \
    }                                                                                              \
    for (long b = 0; b < batch; b++) {                                                             \
      out[b] = 0;                                                                                  \
      for (long s = 0; s < positions; s++) out[b] += changes[s * batch + b];                       \
    }                                                                                              \
    free(changes);                                                                                 \
  }

KERNELS(f32)
KERNELS(bf16)
