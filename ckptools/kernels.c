/* Linear formulas over stored floats: decode, multiply, add, round once, look for NaN and Inf.

   The arithmetic of `evaluation.py`, operation for operation, in one pass over memory; and products of
   an adapter's two factors. No Python in it: `native.py` calls it through ctypes, which lets other
   threads run meanwhile. Compiled without contraction (-ffp-contract=off): a fused multiply-add would
   round differently. Only the products ask for it.

   Source of the roundings: Dekker 1971, "A floating-point technique for extending the available
   precision", section 5; IEEE 754-2019, section 4.3.1 (to nearest, ties to even); Boldo and
   Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
   to odd", section 3. */

#include <stdint.h>
#include <string.h>

#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
#error "floats are computed in a wider format here: results would be rounded twice"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors are little-endian"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define WIDE 1
#define WIDE_TARGET __attribute__((target("avx2,f16c")))
#define FUSED_TARGET __attribute__((target("avx2,fma")))
#define WIDEST_TARGET __attribute__((target("avx512f")))
#define INLINE static inline __attribute__((always_inline))
#else
#define WIDE 0
#define INLINE static inline
#endif

#define VERSION 5
#define BLOCK 1024 /* elements at a time: a few blocks stay in the first cache */
#define TILE 64    /* most columns of a product at a time */

enum dtype { F16, BF16, F32, F64, TABLE };
enum operation { LOAD, SCALE, ADD, SUBTRACT };

struct read {
  const uint8_t *data;
  const float *table; /* the 256 values of an 8-bit float */
  int64_t dtype;
};

/* LOAD:     buffer[depth] = read
   SCALE:    buffer[depth] *= factor
   ADD:      buffer[depth] += buffer[depth + 1]
   SUBTRACT: buffer[depth] -= buffer[depth + 1] */
struct step {
  int32_t operation, depth, read;
  double factor;
};

static const int WIDTH[] = {2, 2, 4, 8, 1};

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE uint16_t load16(const uint8_t *data, int64_t index) {
  uint16_t bits;
  memcpy(&bits, data + 2 * index, 2);
  return bits;
}

/* --- to fp32, exactly but for doubles ---------------------------------------------------------- */

INLINE void decode_f16(const uint8_t *data, float *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t half = load16(data, i), size = half & 0x7fff;
    uint32_t bits = bits_of(float_of((half & 0x8000) << 16 | size << 13) * 0x1p112f);
    out[i] = float_of(size >= 0x7c00 ? bits | 0x7f800000 : bits); /* NaN and Inf */
  }
}

INLINE void decode_bf16(const uint8_t *data, float *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = float_of((uint32_t)load16(data, i) << 16);
}

INLINE void decode_f64(const uint8_t *data, float *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    double value;
    memcpy(&value, data + 8 * i, 8);
    out[i] = (float)value;
  }
}

INLINE void decode_table(const uint8_t *data, const float *table, float *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = table[data[i]];
}

/* --- from fp32, to nearest, ties to even; whether any result is NaN or Inf --------------------- */

/* The last place of the result is found by adding 1.5 times the number whose own last place that
   is: the low bits of the sum then count in units of it, also where results are subnormal. */
INLINE int encode_f16(const float *values, uint8_t *out, int64_t count) {
  const uint32_t lowest = (127 - 14) << 23; /* of a normal fp16 */
  const uint32_t rounder = (13 << 23) + 0x400000;
  uint32_t odd = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = bits_of(values[i]), size = bits & 0x7fffffff;
    uint32_t exponent = size & 0x7f800000;
    exponent = exponent > lowest ? exponent : lowest;
    uint32_t units = bits_of(float_of(size) + float_of(exponent + rounder)) - (exponent + rounder);
    uint32_t half = ((exponent - lowest) >> 13) + units;
    uint32_t over = size >= 0x477ff000; /* 65520, which rounds to Inf */
    half = (bits >> 16 & 0x8000) | (over ? 0x7c00 : half);
    uint16_t stored = (uint16_t)(size > 0x7f800000 ? 0x7e00 : half); /* every NaN is this one */
    odd |= over;
    memcpy(out + 2 * i, &stored, 2);
  }
  return odd != 0;
}

INLINE int encode_bf16(const float *values, uint8_t *out, int64_t count) {
  uint32_t odd = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = bits_of(values[i]), size = bits & 0x7fffffff;
    uint32_t half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint16_t stored = (uint16_t)(size > 0x7f800000 ? 0x7fc0 : half);
    odd |= size >= 0x7f7f8000; /* rounds to Inf */
    memcpy(out + 2 * i, &stored, 2);
  }
  return odd != 0;
}

INLINE int encode_f32(const float *values, uint8_t *out, int64_t count) {
  uint32_t odd = 0;
  for (int64_t i = 0; i < count; i++) odd |= (bits_of(values[i]) & 0x7f800000) == 0x7f800000;
  memcpy(out, values, 4 * (size_t)count);
  return odd != 0;
}

INLINE int encode_f64(const double *values, uint8_t *out, int64_t count) {
  uint64_t odd = 0;
  for (int64_t i = 0; i < count; i++) {
    uint64_t bits;
    memcpy(&bits, &values[i], 8);
    odd |= (bits & 0x7ff0000000000000) == 0x7ff0000000000000;
  }
  memcpy(out, values, 8 * (size_t)count);
  return odd != 0;
}

/* --- fp16 by the processor's own conversions: the same bits ------------------------------------ */

#if WIDE
WIDE_TARGET static void decode_f16_wide(const uint8_t *data, float *out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(data + 2 * i))));
  decode_f16(data + 2 * i, out + i, count - i);
}

WIDE_TARGET static int encode_f16_wide(const float *values, uint8_t *out, int64_t count) {
  const __m128i top = _mm_set1_epi16(0x7c00);
  int odd = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    __m128i large = _mm_cmpeq_epi16(_mm_and_si128(half, top), top);
    if (_mm_testz_si128(large, large))
      _mm_storeu_si128((__m128i *)(out + 2 * i), half);
    else /* the processor keeps what a NaN holds */
      odd |= encode_f16(values + i, out + 2 * i, 8);
  }
  return odd | encode_f16(values + i, out + 2 * i, count - i);
}
#endif

INLINE void decode_half(const uint8_t *data, float *out, int64_t count, int wide) {
#if WIDE
  if (wide) {
    decode_f16_wide(data, out, count);
    return;
  }
#endif
  (void)wide;
  decode_f16(data, out, count);
}

INLINE int encode_half(const float *values, uint8_t *out, int64_t count, int wide) {
#if WIDE
  if (wide) return encode_f16_wide(values, out, count);
#endif
  (void)wide;
  return encode_f16(values, out, count);
}

/* --- formulas ---------------------------------------------------------------------------------- */

INLINE void load(const struct read *read, int64_t begin, float *out, int64_t count, int wide) {
  const uint8_t *data = read->data + begin * WIDTH[read->dtype];
  switch (read->dtype) {
    case F16: decode_half(data, out, count, wide); break;
    case BF16: decode_bf16(data, out, count); break;
    case F32: memcpy(out, data, 4 * (size_t)count); break;
    case F64: decode_f64(data, out, count); break;
    default: decode_table(data, read->table, out, count); break;
  }
}

INLINE int store(const float *values, int64_t dtype, uint8_t *out, int64_t count, int wide) {
  switch (dtype) {
    case F16: return encode_half(values, out, count, wide);
    case BF16: return encode_bf16(values, out, count);
    default: return encode_f32(values, out, count);
  }
}

/* The single whose last bit says "not exact": what is rounded from it is as if from the double. */
INLINE float to_odd(double value) {
  float nearest = (float)value;
  double back = nearest;
  uint32_t bits = bits_of(nearest);
  uint32_t inexact = (back < value) | (back > value); /* neither for NaN */
  uint32_t over = (value > 0) & (back > value);
  uint32_t under = (value < 0) & (back < value);
  return float_of((bits - over - under) | inexact);
}

#if WIDE
/* As `to_odd`, or alike for what it is rounded to; how many were done. The double's own bits are cut
   to a single's 24, with one that says whether the rest was 0: that converts exactly. Subnormal
   singles have fewer bits. To fp16 they all are 0; with bf16's, eight at a time go the long way. */
WIDE_TARGET static int64_t narrow_wide(const double *values, int64_t dtype, float *out,
                                       int64_t count) {
  const __m256i rest = _mm256_set1_epi64x((1 << 29) - 1);
  const __m256i sizes = _mm256_set1_epi32(0x7fffffff), normal = _mm256_set1_epi32(0x00800000);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m128 four[2];
    for (int half = 0; half < 2; half++) {
      __m256i bits = _mm256_loadu_si256((const __m256i *)(values + i + 4 * half));
      __m256i carry = _mm256_add_epi64(_mm256_and_si256(bits, rest), rest);
      bits = _mm256_andnot_si256(rest, _mm256_or_si256(bits, carry));
      four[half] = _mm256_cvtpd_ps(_mm256_castsi256_pd(bits));
    }
    __m256 eight = _mm256_insertf128_ps(_mm256_castps128_ps256(four[0]), four[1], 1);
    _mm256_storeu_ps(out + i, eight);
    if (dtype == BF16) {
      __m256i size = _mm256_and_si256(_mm256_castps_si256(eight), sizes);
      __m256i above = _mm256_cmpgt_epi32(size, _mm256_setzero_si256());
      if (!_mm256_testz_si256(above, _mm256_cmpgt_epi32(normal, size)))
        for (int64_t k = i; k < i + 8; k++) out[k] = to_odd(values[k]);
    }
  }
  return i;
}
#endif

/* x = y * factor, or x += or -= it: what most of a formula is, in one pass each. */
INLINE void take(int32_t operation, double *x, const float *y, double factor, int64_t count) {
  switch (operation) {
    case LOAD: for (int64_t i = 0; i < count; i++) x[i] = y[i] * factor; break;
    case ADD: for (int64_t i = 0; i < count; i++) x[i] += y[i] * factor; break;
    default: for (int64_t i = 0; i < count; i++) x[i] -= y[i] * factor; break;
  }
}

INLINE void take_doubles(int32_t operation, double *x, const uint8_t *data, double factor,
                         int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    double y;
    memcpy(&y, data + 8 * i, 8);
    y *= factor;
    x[i] = operation == LOAD ? y : operation == ADD ? x[i] + y : x[i] - y;
  }
}

/* Singles that are rounded to fp16 or bf16 as the doubles would be. */
INLINE void narrowed(const double *values, int64_t dtype, float *out, int64_t count, int wide) {
  int64_t i = 0;
#if WIDE
  if (wide) i = narrow_wide(values, dtype, out, count);
#endif
  (void)dtype, (void)wide;
  for (; i < count; i++) out[i] = to_odd(values[i]);
}

/* One block, in double precision and rounded once, whatever the result's width. A LOAD takes the
   SCALE and the sum that follow it along: the same operations in the same order. */
INLINE int block(const struct step *steps, int64_t number, const struct read *reads,
                 double *memory, float *narrow, int64_t dtype, uint8_t *out, int64_t begin,
                 int64_t count, int wide) {
  const struct step *end = steps + number;
  for (const struct step *step = steps; step < end; step++) {
    double *x = memory + (int64_t)step->depth * BLOCK;
    if (step->operation == LOAD) {
      const struct read *read = &reads[step->read];
      const int32_t depth = step->depth;
      double factor = 1.0;
      int32_t operation = LOAD;
      if (step + 1 < end && step[1].operation == SCALE && step[1].depth == depth)
        factor = (++step)->factor;
      if (step + 1 < end && step[1].operation >= ADD && step[1].depth == depth - 1) {
        operation = (++step)->operation;
        x -= BLOCK;
      }
      if (read->dtype == F64) {
        take_doubles(operation, x, read->data + 8 * begin, factor, count);
      } else {
        load(read, begin, narrow, count, wide);
        take(operation, x, narrow, factor, count);
      }
      continue;
    }
    const double *y = x + BLOCK, factor = step->factor;
    switch (step->operation) {
      case SCALE: for (int64_t i = 0; i < count; i++) x[i] *= factor; break;
      case ADD: for (int64_t i = 0; i < count; i++) x[i] += y[i]; break;
      default: for (int64_t i = 0; i < count; i++) x[i] -= y[i]; break;
    }
  }
  if (dtype == F64) return encode_f64(memory, out + 8 * begin, count);
  if (dtype == F32)
    for (int64_t i = 0; i < count; i++) narrow[i] = (float)memory[i];
  else
    narrowed(memory, dtype, narrow, count, wide);
  return store(narrow, dtype, out + WIDTH[dtype] * begin, count, wide);
}

INLINE int run(const struct step *steps, int64_t number, const struct read *reads, void *memory,
               int64_t dtype, uint8_t *out, int64_t count, int wide) {
  float *narrow = memory;
  double *doubles = (double *)memory + BLOCK;
  int odd = 0;
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    int64_t length = count - begin < BLOCK ? count - begin : BLOCK;
    odd |= block(steps, number, reads, doubles, narrow, dtype, out, begin, length, wide);
  }
  return !odd;
}

static int run_anywhere(const struct step *steps, int64_t number, const struct read *reads,
                        void *memory, int64_t dtype, uint8_t *out, int64_t count) {
  return run(steps, number, reads, memory, dtype, out, count, 0);
}

#if WIDE
WIDE_TARGET static int run_wide(const struct step *steps, int64_t number,
                                const struct read *reads, void *memory, int64_t dtype,
                                uint8_t *out, int64_t count) {
  return run(steps, number, reads, memory, dtype, out, count, 1);
}
#endif

/* --- products of two factors ------------------------------------------------------------------- */

/* Two rows of `tile` columns: sums[r * tile + j] is the sum over k of its factor[k] times
   packed[k * tile + j], in fp32, in order of k, each step fused: the same bits wherever it is done. */
typedef void two_rows(const float *first, const float *second, const float *packed, int64_t rank,
                      float *sums);

struct way {
  two_rows *sum;
  int64_t tile; /* as many sums as are under way at a time, and stay in registers */
};

static void two_rows_anywhere(const float *first, const float *second, const float *packed,
                              int64_t rank, float *sums) {
  for (int j = 0; j < 32; j++) sums[j] = 0;
  for (int64_t k = 0; k < rank; k++, packed += 16)
    for (int j = 0; j < 16; j++) {
      sums[j] = __builtin_fmaf(first[k], packed[j], sums[j]);
      sums[16 + j] = __builtin_fmaf(second[k], packed[j], sums[16 + j]);
    }
}

#if WIDE
FUSED_TARGET static void two_rows_fused(const float *first, const float *second,
                                        const float *packed, int64_t rank, float *sums) {
  __m256 a0, a1, a2, a3, b0, b1, b2, b3;
  a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _mm256_setzero_ps();
  for (int64_t k = 0; k < rank; k++, packed += 32) {
    const __m256 a = _mm256_set1_ps(first[k]), b = _mm256_set1_ps(second[k]);
    const __m256 p0 = _mm256_loadu_ps(packed), p1 = _mm256_loadu_ps(packed + 8);
    const __m256 p2 = _mm256_loadu_ps(packed + 16), p3 = _mm256_loadu_ps(packed + 24);
    a0 = _mm256_fmadd_ps(a, p0, a0), b0 = _mm256_fmadd_ps(b, p0, b0);
    a1 = _mm256_fmadd_ps(a, p1, a1), b1 = _mm256_fmadd_ps(b, p1, b1);
    a2 = _mm256_fmadd_ps(a, p2, a2), b2 = _mm256_fmadd_ps(b, p2, b2);
    a3 = _mm256_fmadd_ps(a, p3, a3), b3 = _mm256_fmadd_ps(b, p3, b3);
  }
  _mm256_storeu_ps(sums, a0), _mm256_storeu_ps(sums + 8, a1);
  _mm256_storeu_ps(sums + 16, a2), _mm256_storeu_ps(sums + 24, a3);
  _mm256_storeu_ps(sums + 32, b0), _mm256_storeu_ps(sums + 40, b1);
  _mm256_storeu_ps(sums + 48, b2), _mm256_storeu_ps(sums + 56, b3);
}

WIDEST_TARGET static void two_rows_widest(const float *first, const float *second,
                                          const float *packed, int64_t rank, float *sums) {
  __m512 a0, a1, a2, a3, b0, b1, b2, b3;
  a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _mm512_setzero_ps();
  for (int64_t k = 0; k < rank; k++, packed += 64) {
    const __m512 a = _mm512_set1_ps(first[k]), b = _mm512_set1_ps(second[k]);
    const __m512 p0 = _mm512_loadu_ps(packed), p1 = _mm512_loadu_ps(packed + 16);
    const __m512 p2 = _mm512_loadu_ps(packed + 32), p3 = _mm512_loadu_ps(packed + 48);
    a0 = _mm512_fmadd_ps(a, p0, a0), b0 = _mm512_fmadd_ps(b, p0, b0);
    a1 = _mm512_fmadd_ps(a, p1, a1), b1 = _mm512_fmadd_ps(b, p1, b1);
    a2 = _mm512_fmadd_ps(a, p2, a2), b2 = _mm512_fmadd_ps(b, p2, b2);
    a3 = _mm512_fmadd_ps(a, p3, a3), b3 = _mm512_fmadd_ps(b, p3, b3);
  }
  _mm512_storeu_ps(sums, a0), _mm512_storeu_ps(sums + 16, a1);
  _mm512_storeu_ps(sums + 32, a2), _mm512_storeu_ps(sums + 48, a3);
  _mm512_storeu_ps(sums + 64, b0), _mm512_storeu_ps(sums + 80, b1);
  _mm512_storeu_ps(sums + 96, b2), _mm512_storeu_ps(sums + 112, b3);
}
#endif

/* The fastest that this processor runs; none where it fuses nothing, and C's own way is slow. */
static struct way fastest(void) {
#if WIDE
  if (__builtin_cpu_supports("avx512f")) return (struct way){two_rows_widest, 64};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return (struct way){two_rows_fused, 32};
#elif defined(__FP_FAST_FMAF) || defined(__aarch64__)
  return (struct way){two_rows_anywhere, 16};
#endif
  return (struct way){0, 0};
}

/* Columns [left, left + width) of rows [top, bottom) of a product with so many columns; `out` has
   rows as long as the product's. `memory` takes a tile's columns of `down`, row by row. */
static void product(struct way way, const float *up, const float *down, int64_t rank,
                    int64_t columns, int64_t top, int64_t bottom, int64_t left, int64_t width,
                    float *memory, float *out, int add) {
  const int64_t tile = way.tile;
  float sums[2 * TILE];
  for (int64_t at = 0; at < width; at += tile) {
    const int64_t length = width - at < tile ? width - at : tile;
    for (int64_t k = 0; k < rank; k++) {
      float *packed = memory + k * tile;
      memcpy(packed, down + k * columns + left + at, 4 * (size_t)length);
      for (int64_t j = length; j < tile; j++) packed[j] = 0;
    }
    for (int64_t row = top; row < bottom; row += 2) {
      const int64_t rows = bottom - row < 2 ? 1 : 2;
      way.sum(up + row * rank, up + (row + rows - 1) * rank, memory, rank, sums);
      for (int64_t r = 0; r < rows; r++) {
        float *target = out + (row - top + r) * columns + at;
        const float *own = sums + r * tile;
        if (add)
          for (int64_t j = 0; j < length; j++) target[j] += own[j];
        else
          memcpy(target, own, 4 * (size_t)length);
      }
    }
  }
}

#define EXPORT __attribute__((visibility("default")))

/* What a caller was written for: another version is not to be called. */
EXPORT int64_t ckptools_version(void) { return VERSION; }

/* Bytes of memory that `ckptools_mix` takes for formulas of that depth. */
EXPORT int64_t ckptools_memory(int64_t depth) { return (depth + 3) * BLOCK * 8; }

/* Make `count` elements of the output from as many of every read.

   steps    `number` of them; their result is in buffer 0
   memory   `ckptools_memory` bytes, aligned to 8
   dtype    of the output: F16, BF16, F32 or F64
   portable whether to leave the processor's own fp16 conversions alone
   Returns whether all results are finite; a NaN or Inf of a read is one of the result. */
EXPORT int64_t ckptools_mix(const struct step *steps, int64_t number, const struct read *reads,
                            void *memory, int64_t dtype, uint8_t *out, int64_t count,
                            int64_t portable) {
#if WIDE
  if (!portable && __builtin_cpu_supports("avx2")) /* then it has F16C, too */
    return run_wide(steps, number, reads, memory, dtype, out, count);
#endif
  (void)portable;
  return run_anywhere(steps, number, reads, memory, dtype, out, count);
}

/* Whether `ckptools_low_rank` is fast here. */
EXPORT int64_t ckptools_fuses(void) { return fastest().tile != 0; }

/* Bytes of memory that `ckptools_low_rank` takes for factors of that rank. */
EXPORT int64_t ckptools_low_rank_memory(int64_t rank) { return rank * TILE * 4; }

/* Elements [begin, begin + count), in row order, of the product of up (rows, rank) and down
   (rank, columns), both fp32, into `out`, or onto what is there.

   memory   `ckptools_low_rank_memory` bytes
   portable whether to leave what the processor does by itself alone */
EXPORT void ckptools_low_rank(const float *up, const float *down, int64_t rank, int64_t columns,
                              int64_t begin, int64_t count, float *memory, float *out, int64_t add,
                              int64_t portable) {
  struct way way = fastest();
  if (portable || !way.tile) way = (struct way){two_rows_anywhere, 16};
  int64_t row = begin / columns, left = begin % columns;
  while (count > 0) { /* the end of a row, whole rows, the start of one */
    const int64_t rest = columns - left, width = count < rest ? count : rest;
    const int64_t rows = width < columns ? 1 : count / columns;
    product(way, up, down, rank, columns, row, row + rows, left, width, memory, out, add != 0);
    out += width < columns ? width : rows * columns;
    count -= width < columns ? width : rows * columns;
    row += rows;
    left = 0;
  }
}
