// Vectors of channels for the CPU kernels: width, loads and stores of every dtype, exp, log1p, sigmoid.
// Plain GCC/Clang vector extensions; no torch headers, no intrinsics beyond the two marked for AVX-512.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// SHUFFLE(a, b, i, j, k, l) makes each four lanes of the result from lanes i, j of a's four and k, l of b's.
#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int WIDTH = 16;
#define SHUFFLE(a, b, i, j, k, l)                                                                    \
    __builtin_shufflevector(a, b, i, j, k + 16, l + 16, i + 4, j + 4, k + 20, l + 20, i + 8, j + 8, \
                            k + 24, l + 24, i + 12, j + 12, k + 28, l + 28)
#elif defined(__AVX__)
#include <immintrin.h>
constexpr int WIDTH = 8;
#define SHUFFLE(a, b, i, j, k, l) \
    __builtin_shufflevector(a, b, i, j, k + 8, l + 8, i + 4, j + 4, k + 12, l + 12)
#else
#if defined(__SSE__)
#include <xmmintrin.h>
#endif
constexpr int WIDTH = 4;
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k + 4, l + 4)
#endif

typedef float vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t hvec __attribute__((vector_size(WIDTH * 2)));

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};
// Gradients overflow to infinity, which is how loss scaling notices; everything else stops at float16's largest.
struct float16_gradient {
    uint16_t bits;
};

// A tensor (batch, tokens, channels) with contiguous channels; strides in elements.
struct View {
    void* data;
    int64_t batch_stride;
    int64_t token_stride;
};

inline vec splat(float value) { return vec{} + value; }

inline ivec bits_of(vec value) {
    ivec bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline vec from_bits(ivec bits) {
    vec value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline vec select(ivec mask, vec yes, vec no) {
    return from_bits((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

inline float sum_lanes(vec value) {
    float total = 0;
    for (int lane = 0; lane < WIDTH; ++lane) total += value[lane];
    return total;
}

typedef float quad __attribute__((vector_size(16)));

// Sums of neighbouring lanes: lane i of the result holds a part of the sum over the lanes of vectors[i % 4].
inline vec fold_lanes(const vec vectors[4]) {
    const vec ab = SHUFFLE(vectors[0], vectors[1], 0, 1, 0, 1) + SHUFFLE(vectors[0], vectors[1], 2, 3, 2, 3);
    const vec cd = SHUFFLE(vectors[2], vectors[3], 0, 1, 0, 1) + SHUFFLE(vectors[2], vectors[3], 2, 3, 2, 3);
    return SHUFFLE(ab, cd, 0, 2, 0, 2) + SHUFFLE(ab, cd, 1, 3, 1, 3);
}

// The four sums whose parts fold_lanes left in a vector.
inline quad unfold_lanes(vec folded) {
    quad parts[WIDTH / 4];
    std::memcpy(parts, &folded, sizeof parts);
    quad total = parts[0];
    for (int i = 1; i < WIDTH / 4; ++i) total += parts[i];
    return total;
}

// 2^x: n = round(x), then a polynomial of x - n with p(0) = 1 (relative error 9e-8 before rounding).
inline vec exp2_of(vec x) {
#if defined(__AVX512F__)
    const vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vec r = x - n;
#else
    x = select(x < -126.0f, splat(-126.0f), x);
    x = select(x > 127.0f, splat(127.0f), x);
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vec shifted = x + magic;
    const vec n = shifted - magic;
    const vec r = x - n;
#endif
    vec p = splat(0.001325460243377725f);
    p = p * r + 0.009671999180714779f;
    p = p * r + 0.05550779324549893f;
    p = p * r + 0.24022231907060176f;
    p = p * r + 0.6931469302343777f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);  // right down to 0 and up to infinity
#else
    return from_bits(bits_of(p) + ((bits_of(shifted) - bits_of(magic)) << 23));
#endif
}

constexpr float LOG2E = 1.44269504088896341f;

inline vec exp_of(vec x) { return exp2_of(x * LOG2E); }

// log(1 + u) for u in [0, 1], by 2 atanh(u / (2 + u)); relative error 2e-7.
inline vec log1p_of_unit(vec u) {
    const vec s = u / (u + 2.0f);
    const vec s2 = s * s;
    vec p = splat(0.14100825475741596f);
    p = p * s2 + 0.13982863548814678f;
    p = p * s2 + 0.20011833610028967f;
    p = p * s2 + 0.33333186046972324f;
    return 2.0f * s + 2.0f * s * s2 * p;
}

inline vec sigmoid_of(vec x) { return 1.0f / (exp2_of(x * -LOG2E) + 1.0f); }

inline vec softplus_of(vec x) {
    const vec magnitude = from_bits(bits_of(x) & 0x7fffffff);
    const vec positive = select(x < 0.0f, vec{}, x);
    return positive + log1p_of_unit(exp2_of(magnitude * -LOG2E));
}

// ---- loads and stores ----

inline ivec widen(hvec half) { return __builtin_convertvector(half, ivec); }

inline vec decode(vec value, float) { return value; }
inline vec decode(hvec bits, bfloat16) { return from_bits(widen(bits) << 16); }
inline vec decode(hvec bits, float16) {
    const ivec wide = widen(bits);
    const ivec magnitude = (wide & 0x7fff) << 13;
    const vec scaled = from_bits(magnitude) * 5.192296858534828e33f;  // 2^112 mends the exponent's bias
    const ivec special = magnitude >= 0x0f800000;
    const ivec value = (bits_of(scaled) & ~special) | ((magnitude | 0x7f800000) & special);
    return from_bits(value | ((wide & 0x8000) << 16));
}

inline vec decode(hvec bits, float16_gradient) { return decode(bits, float16{}); }

inline hvec narrow(ivec bits) { return __builtin_convertvector(bits, hvec); }

inline vec encode(vec value, float) { return value; }
inline hvec encode(vec value, bfloat16) {
    const ivec bits = bits_of(value);
    const ivec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const ivec nan = (bits & 0x7fffffff) > 0x7f800000;
    return narrow((rounded & ~nan) | (nan & 0x7fc0));
}
inline hvec encode(vec value, float16_gradient) {
    const ivec bits = bits_of(value);
    const ivec magnitude = bits & 0x7fffffff;
    const ivec sign = (bits >> 16) & 0x8000;
    const ivec normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // 0.5 has the exponent at which float32's last bit is float16's smallest denormal.
    const ivec denormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000;
    const ivec is_denormal = magnitude < 0x38800000;
    const ivec is_large = magnitude >= 0x477ff000;  // rounds to infinity, or is not finite
    const ivec nan = magnitude > 0x7f800000;
    ivec result = (normal & ~is_denormal) | (denormal & is_denormal);
    result = (result & ~is_large) | (0x7c00 & is_large);
    result = (result & ~nan) | (0x7e00 & nan);
    return narrow(result | sign);
}

inline hvec encode(vec value, float16) {
    value = select(value > 65504.0f, splat(65504.0f), value);
    return encode(select(value < -65504.0f, splat(-65504.0f), value), float16_gradient{});
}

template <typename T>
struct Packed {
    typedef hvec type;
};
template <>
struct Packed<float> {
    typedef vec type;
};

template <typename T>
inline vec load(const T* ptr) {
    typename Packed<T>::type packed;
    std::memcpy(&packed, ptr, sizeof packed);
    return decode(packed, T{});
}

template <typename T>
inline void store(T* ptr, vec value) {
    const typename Packed<T>::type packed = encode(value, T{});
    std::memcpy(ptr, &packed, sizeof packed);
}

// The first `lanes` channels; the others read as zero and are not written.
template <typename T>
inline vec load_some(const T* ptr, int lanes) {
    typename Packed<T>::type packed{};
    std::memcpy(&packed, ptr, lanes * sizeof(T));
    return decode(packed, T{});
}

template <typename T>
inline void store_some(T* ptr, vec value, int lanes) {
    const typename Packed<T>::type packed = encode(value, T{});
    std::memcpy(ptr, &packed, lanes * sizeof(T));
}

template <typename T>
inline vec load_lanes(const T* ptr, int lanes) {
    return lanes == WIDTH ? load(ptr) : load_some(ptr, lanes);
}

template <typename T>
inline void store_lanes(T* ptr, vec value, int lanes) {
    lanes == WIDTH ? store(ptr, value) : store_some(ptr, value, lanes);
}

template <typename T>
inline float load_one(const T* ptr) {
    return load_some(ptr, 1)[0];
}
template <>
inline float load_one(const float* ptr) {
    return *ptr;
}

// Call f with a null pointer of the element type that dtype names.
template <typename Half = float16, typename F>
inline void with_dtype(int32_t dtype, F&& f) {
    switch (dtype) {
        case BFLOAT16: return f(static_cast<bfloat16*>(nullptr));
        case FLOAT16: return f(static_cast<Half*>(nullptr));
        default: return f(static_cast<float*>(nullptr));
    }
}

// ---- memory and threads ----

// Zeroed, aligned scratch that frees itself; `ok()` is false when memory ran out.
class Scratch {
   public:
    explicit Scratch(size_t floats) {
        const size_t bytes = ((floats + 16) * sizeof(float) + 63) / 64 * 64;
        data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
        if (data_) std::memset(data_, 0, bytes);
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    bool ok() const { return data_ != nullptr; }
    float* floats() { return data_; }
    // The next `count` vectors of the scratch.
    vec* take(size_t count) {
        vec* taken = reinterpret_cast<vec*>(data_) + used_;
        used_ += count;
        return taken;
    }

   private:
    float* data_;
    size_t used_ = 0;
};

// Treats denormals as zero in this thread while it lives: states fade to nothing without slowing down.
class FlushDenormals {
   public:
#if defined(__SSE__)
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

   private:
    unsigned saved_;
#endif
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int OK = 0;
constexpr int OUT_OF_MEMORY = 1;
