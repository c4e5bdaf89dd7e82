// Depthwise convolution over tokens with SiLU, forward and backward, for one direction or for both in one pass.
//
// Tokens run in the outer loop, so every row is read as a stream. A direction's K taps reach back (or ahead when
// reversed) over rows that are still in L1. Float32 bytes per channel and token: 4 read + 4 written a direction
// forward; backward 4 (x) + 4 a direction (dy) read, 4 written.
//
//   (1, 6085, 384), K 4, float32, strided x        ms    GB/s
//   causal_conv1d forward                          2.6     7.3
//   causal_conv1d backward                         7.3     3.9
//   bidirectional_conv1d forward                   3.8     7.4
//   bidirectional_conv1d backward                 10.8     3.5
// AMD EPYC (Zen 4, AVX-512), 2 cores, g++ 12.2, torch 2.15, 2026-11-23; visionmamba bench kernels remakes it. The
// machine was shared, so the times are CPU time of one thread, best of many.
#include "simd.h"

namespace {

constexpr int64_t CHUNK = 128;  // tokens of one task

struct ConvDirection {
    const float* weight;  // (taps, channels), transposed by the caller
    const float* bias;    // (channels,) or null
    int64_t taps;
    int32_t reverse;
    View y;         // output of the forward, its gradient in the backward
    float* dweight;  // (channels, taps)
    float* dbias;
};

struct ConvProblem {
    int64_t batch, length, channels;
    int32_t dtype, silu, num_directions, num_threads;
    View x;
    View dx;
    ConvDirection directions[2];
};

// The convolution of one vector of channels at token t, before the activation.
template <typename T>
inline vec convolve(const ConvDirection& direction, const T* x, int64_t stride, int64_t t,
                    int64_t length, int64_t channels, int64_t c, int lanes) {
    vec sum = direction.bias ? load_lanes(direction.bias + c, lanes) : vec{};
    const int64_t reach = direction.taps - 1;
    for (int64_t k = 0; k <= reach; ++k) {
        const int64_t source = direction.reverse ? t + reach - k : t - reach + k;
        if (source < 0 || source >= length) continue;
        sum += load_lanes(direction.weight + k * channels + c, lanes) *
               load_lanes(x + source * stride + c, lanes);
    }
    return sum;
}

// The same for inner tokens and K = 4, without tests.
template <typename T>
inline vec convolve4(const ConvDirection& direction, const T* const rows[4], int64_t channels,
                     int64_t c) {
    vec sum = direction.bias ? load(direction.bias + c) : vec{};
    for (int k = 0; k < 4; ++k) sum += load(direction.weight + k * channels + c) * load(rows[k] + c);
    return sum;
}

template <typename T>
void forward_chunk(const ConvProblem& p, const ConvDirection& direction, int64_t b, int64_t first,
                   int64_t last) {
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.batch_stride;
    const int64_t stride = p.x.token_stride, reach = direction.taps - 1;
    for (int64_t t = first; t < last; ++t) {
        T* y = static_cast<T*>(direction.y.data) + b * direction.y.batch_stride +
               t * direction.y.token_stride;
        const int64_t start = direction.reverse ? t : t - reach;
        const bool inner = reach == 3 && start >= 0 && start + reach < p.length;
        int64_t c = 0;
        if (inner) {
            const T* rows[4];
            for (int k = 0; k < 4; ++k) rows[k] = x + (direction.reverse ? t + 3 - k : t - 3 + k) * stride;
            for (; c + WIDTH <= p.channels; c += WIDTH) {
                const vec sum = convolve4(direction, rows, p.channels, c);
                store(y + c, p.silu ? sum * sigmoid_of(sum) : sum);
            }
        }
        for (; c < p.channels; c += WIDTH) {
            const int lanes = min_of(WIDTH, p.channels - c);
            const vec sum = convolve(direction, x, stride, t, p.length, p.channels, c, lanes);
            store_lanes(y + c, p.silu ? sum * sigmoid_of(sum) : sum, lanes);
        }
    }
}

// One task: dx of tokens [first, last) and this chunk's share of dweight and dbias. A direction's gradient before
// the activation is kept for the taps' window, (CHUNK + taps - 1) rows, so halo rows are computed twice.
template <typename T>
void backward_chunk(const ConvProblem& p, int64_t b, int64_t first, int64_t last, float* partial,
                    float* window) {
    const int64_t padded = ceil_div(p.channels, WIDTH) * WIDTH;
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.batch_stride;
    const int64_t stride = p.x.token_stride;
    for (int32_t i = 0; i < p.num_directions; ++i) {
        const ConvDirection& direction = p.directions[i];
        const int64_t reach = direction.taps - 1;
        const int64_t low = direction.reverse ? first - reach : first;
        const int64_t high = direction.reverse ? last : last + reach;
        float* dweight = partial;
        float* dbias = partial + direction.taps * padded;
        for (int64_t t = low; t < high; ++t) {
            float* dpre = window + (t - low) * padded;
            if (t < 0 || t >= p.length) {
                std::memset(dpre, 0, padded * sizeof(float));
                continue;
            }
            const T* dy = static_cast<const T*>(direction.y.data) + b * direction.y.batch_stride +
                          t * direction.y.token_stride;
            const bool own = t >= first && t < last;
            for (int64_t c = 0; c < p.channels; c += WIDTH) {
                const int lanes = min_of(WIDTH, p.channels - c);
                vec gradient = load_lanes(dy + c, lanes);
                if (p.silu) {
                    const vec sum = convolve(direction, x, stride, t, p.length, p.channels, c, lanes);
                    const vec sigmoid = sigmoid_of(sum);
                    gradient *= sigmoid * (1.0f + sum * (1.0f - sigmoid));
                }
                store(dpre + c, gradient);
                if (!own) continue;
                store(dbias + c, load(dbias + c) + gradient);
                for (int64_t k = 0; k <= reach; ++k) {
                    const int64_t source = direction.reverse ? t + reach - k : t - reach + k;
                    if (source < 0 || source >= p.length) continue;
                    float* target = dweight + k * padded + c;
                    store(target, load(target) + gradient * load_lanes(x + source * stride + c, lanes));
                }
            }
        }
        for (int64_t t = first; t < last; ++t) {
            T* dx = static_cast<T*>(p.dx.data) + b * p.dx.batch_stride + t * p.dx.token_stride;
            float* sums = window + (CHUNK + reach) * padded + (t - first) * padded;
            for (int64_t c = 0; c < p.channels; c += WIDTH) {
                const int lanes = min_of(WIDTH, p.channels - c);
                vec sum = i == 0 ? vec{} : load(sums + c);
                for (int64_t k = 0; k <= reach; ++k) {
                    const int64_t target = direction.reverse ? t - reach + k : t + reach - k;
                    sum += load_lanes(direction.weight + k * p.channels + c, lanes) *
                           load(window + (target - low) * padded + c);
                }
                if (i + 1 == p.num_directions)
                    store_lanes(dx + c, sum, lanes);
                else
                    store(sums + c, sum);
            }
        }
        partial += (direction.taps + 1) * padded;
    }
}

}  // namespace

extern "C" int vim_causal_conv1d_forward(const ConvProblem* problem) {
    const ConvProblem& p = *problem;
    const int64_t chunks = ceil_div(p.length, CHUNK);
#pragma omp parallel for schedule(static) num_threads(p.num_threads)
    for (int64_t task = 0; task < p.batch * chunks; ++task) {
        const int64_t b = task / chunks, first = task % chunks * CHUNK;
        const int64_t last = min_of(first + CHUNK, p.length);
        with_dtype(p.dtype, [&](auto* tag) {
            for (int32_t i = 0; i < p.num_directions; ++i)
                forward_chunk<std::remove_pointer_t<decltype(tag)>>(p, p.directions[i], b, first, last);
        });
    }
    return OK;
}

extern "C" int vim_causal_conv1d_backward(const ConvProblem* problem) {
    const ConvProblem& p = *problem;
    const int64_t padded = ceil_div(p.channels, WIDTH) * WIDTH;
    const int64_t chunks = ceil_div(p.length, CHUNK), tasks = p.batch * chunks;
    // A share of dweight and dbias for every group of tasks; groups depend on sizes only, so sums are reproducible.
    const int64_t groups = min_of(tasks, 64);
    int64_t share = 0, widest = 0;
    for (int32_t i = 0; i < p.num_directions; ++i) {
        share += (p.directions[i].taps + 1) * padded;
        if (p.directions[i].taps > widest) widest = p.directions[i].taps;
    }
    Scratch partials(groups * share);
    if (!partials.ok()) return OUT_OF_MEMORY;
    int status = OK;
#pragma omp parallel num_threads(p.num_threads)
    {
        Scratch window((2 * CHUNK + widest - 1) * padded);
        if (!window.ok()) {
#pragma omp atomic write
            status = OUT_OF_MEMORY;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < groups; ++group) {
            if (!window.ok()) continue;
            for (int64_t task = group * tasks / groups; task < (group + 1) * tasks / groups; ++task) {
                const int64_t b = task / chunks, first = task % chunks * CHUNK;
                const int64_t last = min_of(first + CHUNK, p.length);
                with_dtype<float16_gradient>(p.dtype, [&](auto* tag) {
                    backward_chunk<std::remove_pointer_t<decltype(tag)>>(
                        p, b, first, last, partials.floats() + group * share, window.floats());
                });
            }
        }
    }
    float* partial = partials.floats();
    for (int32_t i = 0; i < p.num_directions; ++i) {
        const ConvDirection& direction = p.directions[i];
        for (int64_t c = 0; c < p.channels; ++c) {
            for (int64_t k = 0; k <= direction.taps; ++k) {
                float total = 0;
                for (int64_t group = 0; group < groups; ++group)
                    total += partial[group * share + k * padded + c];
                if (k < direction.taps)
                    direction.dweight[c * direction.taps + k] = total;
                else if (direction.dbias)
                    direction.dbias[c] = total;
            }
        }
        partial += (direction.taps + 1) * padded;
    }
    return status;
}
