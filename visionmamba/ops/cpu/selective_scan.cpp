// The selective scan of one direction or of two with their sum, softplus, dt projection and SiLU gate fused; forward
// and backward.
//
// Forward: a task is one sample and a group of channels. It walks the tokens in tiles of TILE; in a tile, for each
// block of WIDTH channels, the step sizes are made in scratch, then the states run in registers, four at a time. The
// first of two directions leaves its sum in y (float32) and the second adds, gates, scales and stores.
// Backward: the same walk from the last tile to the first. A tile starts from the state the forward stored, runs
// forward once more keeping decays and states in L1, then backward. What is summed over channels (dB, dC, the
// gradient of dt_r) is folded to four sums a vector and kept so until the group's channels are done, then reduced;
// groups are added in order, so results depend on the number of threads but not on scheduling.
// Float32 bytes per token and channel: forward 8 read (x, dt) + 4 written, gate 4 more; two directions with gate 12
// read + 4 written, y 8 in between; backward of two 24 read + 12 written; states stored: N / 16 a direction.
//
//   (1, 6085, 384), N 16, R 12, float32           ms    % of the roof (multiply-adds, one 16-wide a cycle, 3.66 GHz)
//   selective_scan forward                         8.4    68
//   selective_scan backward                       18.6    58
//   bidirectional_scan forward                    17.9    85
//   bidirectional_scan backward                   45.5    66
//   the same forward in PyTorch (chunked.py)       217, on two threads
// AMD EPYC (Zen 4, AVX-512), 2 cores, g++ 12.2, torch 2.15, 2026-11-23; visionmamba bench kernels remakes it. The
// machine was shared, so the times are CPU time of one thread, best of many.
#include "simd.h"

namespace {

constexpr int TILE = 64;  // tokens between stored states; visionmamba.ops.selective_scan.checkpoint_length agrees

struct ScanDirection {
    View x, dt;            // dt.data is null when the step comes from dt_r @ dt_weight.T
    View dt_r, B, C;
    const float* A;          // (channels, states)
    const float* D;          // (channels,) or null
    const float* dt_weight;  // (channels, rank)
    const float* dt_bias;    // (channels,) or null
    const float* initial_state;  // (batch, channels, states) or null
    float* last_state;           // the same shape
    float* checkpoints;          // (batch, tiles, states, channels) or null
    int64_t rank;
    int32_t reverse, softplus;
    // Backward only.
    View dx, ddt;           // gradients in the problem's dtype; ddt.data is null with a projection
    float* dprojected;      // (batch, length, rank + 2 states) float32: gradients of dt_r, B, C
    float *dA, *dD, *ddt_weight, *ddt_bias, *dinitial_state;  // null where not wanted
    const float* dlast_state;  // null for zero
};

struct ScanProblem {
    int64_t batch, length, channels, states;
    int32_t dtype, num_directions, num_threads;
    float scale;
    View y;   // backward: its gradient
    View z;   // data is null for no gate
    View dz;
    ScanDirection directions[2];
};

// The parameters of a direction with channels in the lanes: rows of `padded` channels.
struct Weights {
    float* A;          // (states, padded), not scaled
    float* dt_weight;  // (rank, padded)
};

// States and ranks are worked on in fours; what is added is zero and stays zero.
inline int64_t fours(int64_t count) { return ceil_div(count, 4) * 4; }

int64_t weights_size(const ScanProblem& p, const ScanDirection& d, int64_t padded) {
    return (fours(p.states) + fours(d.rank)) * padded;
}

Weights transpose_weights(const ScanProblem& p, const ScanDirection& d, int64_t padded, float* memory) {
    Weights w{memory, memory + fours(p.states) * padded};
    for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t n = 0; n < p.states; ++n) w.A[n * padded + c] = d.A[c * p.states + n];
        for (int64_t r = 0; r < d.rank; ++r) w.dt_weight[r * padded + c] = d.dt_weight[c * d.rank + r];
    }
    return w;
}

inline int64_t token_of(const ScanDirection& d, int64_t position, int64_t length) {
    return d.reverse ? length - 1 - position : position;
}

// Rows of a few columns (B, C, dt_r) of the tile as float32.
void load_rows(const ScanProblem& p, const ScanDirection& d, const View& view, int64_t b,
               int64_t first, int count, int64_t columns, float* rows) {
    with_dtype(p.dtype, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const T* data = static_cast<const T*>(view.data) + b * view.batch_stride;
        for (int t = 0; t < count; ++t) {
            const T* row = data + token_of(d, first + t, p.length) * view.token_stride;
            float* target = rows + t * fours(columns);
            int64_t c = 0;
            for (; c + WIDTH <= columns; c += WIDTH) store(target + c, load(row + c));
            for (; c < columns; ++c) target[c] = load_one(row + c);
            for (; c < fours(columns); ++c) target[c] = 0;
        }
    });
}

// One block of channels of the tile.
void load_block(const ScanProblem& p, const ScanDirection& d, const View& view, int64_t b,
                int64_t first, int count, int64_t channel, int lanes, vec* block) {
    with_dtype(p.dtype, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const T* data = static_cast<const T*>(view.data) + b * view.batch_stride + channel;
        const int64_t step = d.reverse ? -view.token_stride : view.token_stride;
        const T* row = data + token_of(d, first, p.length) * view.token_stride;
        if (lanes == WIDTH)
            for (int t = 0; t < count; ++t) block[t] = load(row + t * step);
        else
            for (int t = 0; t < count; ++t) block[t] = load_some(row + t * step, lanes);
    });
}

template <typename Half = float16_gradient>
void store_block(const ScanProblem& p, const ScanDirection& d, const View& view, int64_t b,
                 int64_t first, int count, int64_t channel, int lanes, const vec* block) {
    with_dtype<Half>(p.dtype, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        T* data = static_cast<T*>(view.data) + b * view.batch_stride + channel;
        const int64_t step = d.reverse ? -view.token_stride : view.token_stride;
        T* row = data + token_of(d, first, p.length) * view.token_stride;
        if (lanes == WIDTH)
            for (int t = 0; t < count; ++t) store(row + t * step, block[t]);
        else
            for (int t = 0; t < count; ++t) store_some(row + t * step, block[t], lanes);
    });
}

// Cache lines of the next block of channels, asked for while this one computes: its rows lie too far apart for the
// hardware to foresee.
struct Ahead {
    const char* rows[5];
    int64_t steps[5];
    int count = 0;

    void add(const ScanProblem& p, const ScanDirection& d, const View& view, int64_t b, int64_t first,
             int64_t channel) {
        if (!view.data) return;
        const int64_t bytes = p.dtype == FLOAT32 ? 4 : 2;
        const int64_t token = token_of(d, first, p.length);
        rows[count] = static_cast<const char*>(view.data) +
                      (b * view.batch_stride + token * view.token_stride + channel) * bytes;
        steps[count++] = (d.reverse ? -view.token_stride : view.token_stride) * bytes;
    }

    void fetch(int t) const {
        for (int i = 0; i < count; ++i) __builtin_prefetch(rows[i] + t * steps[i], 0, 2);
    }
};

// Step sizes of one block before softplus.
void raw_steps(const ScanProblem& p, const ScanDirection& d, const Weights& w, int64_t padded, int64_t b,
               int64_t first, int count, int64_t channel, int lanes, const float* dt_r, vec* steps) {
    const vec bias = d.dt_bias ? load_some(d.dt_bias + channel, lanes) : vec{};
    if (d.dt.data) {
        load_block(p, d, d.dt, b, first, count, channel, lanes, steps);
        for (int t = 0; t < count; ++t) steps[t] += bias;
        return;
    }
    const float* weight = w.dt_weight + channel;
    const int64_t rank = fours(d.rank);
    // Rows past `count` hold what earlier tiles left there; their results are not used.
    for (int t = 0; t < count; t += 4) {
        vec s0 = bias, s1 = bias, s2 = bias, s3 = bias;
        const float* row = dt_r + t * rank;
        for (int64_t r = 0; r < d.rank; ++r) {
            const vec column = load(weight + r * padded);
            s0 += row[r] * column;
            s1 += row[r + rank] * column;
            s2 += row[r + 2 * rank] * column;
            s3 += row[r + 3 * rank] * column;
        }
        steps[t] = s0, steps[t + 1] = s1, steps[t + 2] = s2, steps[t + 3] = s3;
    }
}

// Four states of a block of channels through the tile: h = exp(dt A) h + dt x B, y += C h.
void scan_states(int count, const vec* steps, const vec* drive, const float* B, const float* C, int64_t stride,
                 const vec* A, vec* h, vec* y, const Ahead& ahead) {
    vec rate[4], state[4];
    for (int j = 0; j < 4; ++j) rate[j] = A[j] * LOG2E, state[j] = h[j];
    for (int t = 0; t < count; ++t) {
        ahead.fetch(t);
        const vec step = steps[t], input = drive[t];
        vec sum = y[t];
        for (int j = 0; j < 4; ++j) {
            state[j] = exp2_of(step * rate[j]) * state[j] + input * B[t * stride + j];
            sum += state[j] * C[t * stride + j];
        }
        y[t] = sum;
    }
    for (int j = 0; j < 4; ++j) h[j] = state[j];
}

// Buffers of one tile's backward.
struct TileGradients {
    vec *ddt, *dinput;     // (TILE) gradients of dt through the decay, and of dt x
    vec *dB, *dC;          // (TILE, states / 4) folded lanes, summed over blocks
    vec *decays, *states;  // (TILE, 4), (TILE + 1, 4)
};

// Gradients of four states of a block through the tile. `h` enters the tile, `lam` is the gradient that comes from
// behind it and becomes the one that leaves it. y gets the ungated output.
void scan_states_backward(int count, const vec* steps, const vec* drive, const vec* dy, const float* B,
                          const float* C, int64_t stride, const vec* A, const vec* h, vec* lam, vec* dA, vec* y,
                          vec* dB, vec* dC, const TileGradients& g, const Ahead& ahead) {
    vec rate[4], state[4], decay_rate[4], dA_sum[4], adjoint[4];
    for (int j = 0; j < 4; ++j) {
        decay_rate[j] = A[j], rate[j] = A[j] * LOG2E, state[j] = h[j];
        dA_sum[j] = dA[j], adjoint[j] = lam[j];
        g.states[j] = state[j];
    }
    for (int t = 0; t < count; ++t) {
        ahead.fetch(t);
        const vec step = steps[t], input = drive[t];
        vec sum = y[t];
        for (int j = 0; j < 4; ++j) {
            const vec decay = exp2_of(step * rate[j]);
            state[j] = decay * state[j] + input * B[t * stride + j];
            sum += state[j] * C[t * stride + j];
            g.decays[t * 4 + j] = decay;
            g.states[(t + 1) * 4 + j] = state[j];
        }
        y[t] = sum;
    }
    for (int t = count - 1; t >= 0; --t) {
        const vec step = steps[t], input = drive[t], outer = dy[t];
        vec ddt = g.ddt[t], dinput = g.dinput[t], to_B[4], to_C[4];
        for (int j = 0; j < 4; ++j) {
            const vec current = adjoint[j] + outer * C[t * stride + j];
            to_C[j] = outer * g.states[(t + 1) * 4 + j];
            to_B[j] = current * input;
            adjoint[j] = current * g.decays[t * 4 + j];
            const vec through = adjoint[j] * g.states[t * 4 + j];
            dA_sum[j] += through * step;
            ddt += through * decay_rate[j];
            dinput += current * B[t * stride + j];
        }
        dB[t * stride / 4] += fold_lanes(to_B);
        dC[t * stride / 4] += fold_lanes(to_C);
        g.ddt[t] = ddt, g.dinput[t] = dinput;
    }
    for (int j = 0; j < 4; ++j) dA[j] = dA_sum[j], lam[j] = adjoint[j];
}

// Which channels group g of `groups` owns, in blocks of WIDTH.
struct Group {
    int64_t first_block, last_block;
};

Group group_of(int64_t g, int64_t groups, int64_t channels) {
    const int64_t blocks = ceil_div(channels, WIDTH);
    return {g * blocks / groups, (g + 1) * blocks / groups};
}

// As few groups as keep all threads equally busy.
int64_t count_groups(const ScanProblem& p) {
    const int64_t blocks = ceil_div(p.channels, WIDTH), threads = p.num_threads;
    int64_t groups = 1;
    while (groups < blocks && (p.batch * groups) % threads != 0 && p.batch * groups < 4 * threads) ++groups;
    return groups;
}

// Copies states between (batch, channels, states) and vectors (states, lanes) of a block.
void load_states(const float* states, int64_t b, const ScanProblem& p, int64_t channel, int lanes, vec* block) {
    for (int64_t n = 0; n < fours(p.states); ++n) {
        block[n] = vec{};
        if (!states || n >= p.states) continue;
        for (int lane = 0; lane < lanes; ++lane)
            block[n][lane] = states[(b * p.channels + channel + lane) * p.states + n];
    }
}

void store_states(float* states, int64_t b, const ScanProblem& p, int64_t channel, int lanes, const vec* block) {
    for (int64_t n = 0; n < p.states; ++n)
        for (int lane = 0; lane < lanes; ++lane)
            states[(b * p.channels + channel + lane) * p.states + n] = block[n][lane];
}

int64_t widest_rank(const ScanProblem& p) {
    const int64_t first = fours(p.directions[0].rank), second = fours(p.directions[1].rank);
    return first > second ? first : second;
}

// The first direction's ungated sum waits in y itself in float32, otherwise in scratch.
bool keeps_sums(const ScanProblem& p) { return p.num_directions == 2 && p.dtype != FLOAT32; }

void forward_task(const ScanProblem& p, const Weights* weights, int64_t padded, int64_t b, Group group,
                  Scratch& scratch) {
    const int64_t blocks = group.last_block - group.first_block, states = fours(p.states);
    vec* h = scratch.take(blocks * states);
    vec* steps = scratch.take(TILE);
    vec* drive = scratch.take(TILE);
    vec* y = scratch.take(TILE);
    vec* x = scratch.take(TILE);
    vec* gate = scratch.take(TILE);
    vec* rates = scratch.take(states);
    float* B = reinterpret_cast<float*>(scratch.take(TILE * states / WIDTH));
    float* C = reinterpret_cast<float*>(scratch.take(TILE * states / WIDTH));
    float* dt_r = reinterpret_cast<float*>(scratch.take(TILE * widest_rank(p) / WIDTH));
    vec* sums = keeps_sums(p) ? scratch.take(p.length * blocks) : nullptr;

    const int64_t tiles = ceil_div(p.length, TILE);
    for (int32_t i = 0; i < p.num_directions; ++i) {
        const ScanDirection& d = p.directions[i];
        const bool is_last = i + 1 == p.num_directions;
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t channel = (group.first_block + k) * WIDTH;
            load_states(d.initial_state, b, p, channel, min_of(WIDTH, p.channels - channel), h + k * states);
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = tile * TILE;
            const int count = min_of(TILE, p.length - first);
            load_rows(p, d, d.B, b, first, count, p.states, B);
            load_rows(p, d, d.C, b, first, count, p.states, C);
            if (!d.dt.data) load_rows(p, d, d.dt_r, b, first, count, d.rank, dt_r);
            for (int64_t k = 0; k < blocks; ++k) {
                const int64_t channel = (group.first_block + k) * WIDTH;
                const int lanes = min_of(WIDTH, p.channels - channel);
                vec* state = h + k * states;
                if (d.checkpoints) {
                    float* kept = d.checkpoints + (b * tiles + tile) * p.states * p.channels + channel;
                    for (int64_t n = 0; n < p.states; ++n) store_lanes(kept + n * p.channels, state[n], lanes);
                }
                load_block(p, d, d.x, b, first, count, channel, lanes, x);
                raw_steps(p, d, weights[i], padded, b, first, count, channel, lanes, dt_r, steps);
                const vec direct = d.D ? load_some(d.D + channel, lanes) : vec{};
                for (int t = 0; t < count; ++t) {
                    if (d.softplus) steps[t] = softplus_of(steps[t]);
                    drive[t] = steps[t] * x[t];
                    y[t] = direct * x[t];
                }
                for (int64_t n = 0; n < states; ++n) rates[n] = load(weights[i].A + n * padded + channel);
                Ahead ahead;
                const int64_t next_first = k + 1 < blocks ? first : first + TILE;
                if (next_first + TILE <= p.length) {
                    const int64_t next = (k + 1 < blocks ? channel : group.first_block * WIDTH - WIDTH) + WIDTH;
                    ahead.add(p, d, d.x, b, next_first, next);
                    ahead.add(p, d, d.dt, b, next_first, next);
                    ahead.add(p, d, p.y, b, next_first, next);
                    if (is_last) ahead.add(p, d, p.z, b, next_first, next);
                }
                for (int64_t n = 0; n < states; n += 4) {
                    scan_states(count, steps, drive, B + n, C + n, states, rates + n, state + n, y, ahead);
                    ahead.count = 0;
                }
                if (!is_last) {
                    if (sums)
                        for (int t = 0; t < count; ++t) sums[token_of(d, first + t, p.length) * blocks + k] = y[t];
                    else
                        store_block<float16>(p, d, p.y, b, first, count, channel, lanes, y);
                    continue;
                }
                if (i == 1) {
                    if (!sums) load_block(p, d, p.y, b, first, count, channel, lanes, x);
                    for (int t = 0; t < count; ++t)
                        y[t] += sums ? sums[token_of(d, first + t, p.length) * blocks + k] : x[t];
                }
                if (p.z.data) {
                    load_block(p, d, p.z, b, first, count, channel, lanes, gate);
                    for (int t = 0; t < count; ++t) y[t] *= p.scale * gate[t] * sigmoid_of(gate[t]);
                } else {
                    for (int t = 0; t < count; ++t) y[t] *= p.scale;
                }
                store_block<float16>(p, d, p.y, b, first, count, channel, lanes, y);
            }
        }
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t channel = (group.first_block + k) * WIDTH;
            store_states(d.last_state, b, p, channel, min_of(WIDTH, p.channels - channel), h + k * states);
        }
    }
}

int64_t forward_scratch(const ScanProblem& p, int64_t blocks) {
    const int64_t states = fours(p.states);
    int64_t vectors = (blocks + 1) * states + 5 * TILE + TILE * (2 * states + widest_rank(p)) / WIDTH;
    if (keeps_sums(p)) vectors += p.length * blocks;
    return vectors * WIDTH;
}

// Per-sample sums of the parameters' gradients: (channels padded) rows of A's states, dt_weight's ranks, D, dt_bias.
int64_t parameter_rows(const ScanProblem& p, const ScanDirection& d) { return fours(p.states) + fours(d.rank) + 2; }

// The sums over lanes of `columns` folded columns.
void unfold_row(const vec* folded, int64_t columns, float* row) {
    for (int64_t c = 0; c < columns; c += 4) {
        const quad sums = unfold_lanes(folded[c / 4]);
        std::memcpy(row + c, &sums, min_of(4, columns - c) * sizeof(float));
    }
}

// dprojected_part is (length, rank + 2 states) of this task; parameters is this sample's sums of the direction.
void backward_task(const ScanProblem& p, const ScanDirection& d, const Weights& w, int64_t padded, int64_t b,
                   Group group, bool first_direction, bool last_direction, vec* dz_sums, float* parameters,
                   float* dprojected_part, Scratch& scratch) {
    const int64_t blocks = group.last_block - group.first_block, columns = d.rank + 2 * p.states;
    const int64_t states = fours(p.states), rank = fours(d.rank), folds = (rank + 2 * states) / 4;
    vec* lam = scratch.take(blocks * states);
    vec* steps = scratch.take(TILE);
    vec* slopes = scratch.take(TILE);
    vec* drive = scratch.take(TILE);
    vec* x = scratch.take(TILE);
    vec* y = scratch.take(TILE);
    vec* dscan = scratch.take(TILE);
    vec* dgate = scratch.take(TILE);
    vec* rates = scratch.take(states);
    vec* h = scratch.take(states);
    vec* dA = scratch.take(states);
    vec* folded = scratch.take(TILE * folds);
    vec* ddt_r = folded;
    TileGradients g;
    g.dB = folded + TILE * rank / 4;
    g.dC = g.dB + TILE * states / 4;
    g.ddt = scratch.take(TILE);
    g.dinput = scratch.take(TILE);
    g.decays = scratch.take(TILE * 4);
    g.states = scratch.take((TILE + 1) * 4);
    float* B = reinterpret_cast<float*>(scratch.take(TILE * states / WIDTH));
    float* C = reinterpret_cast<float*>(scratch.take(TILE * states / WIDTH));
    float* dt_r = reinterpret_cast<float*>(scratch.take(TILE * rank / WIDTH));

    for (int64_t k = 0; k < blocks; ++k) {
        const int64_t channel = (group.first_block + k) * WIDTH;
        load_states(d.dlast_state, b, p, channel, min_of(WIDTH, p.channels - channel), lam + k * states);
    }
    const int64_t tiles = ceil_div(p.length, TILE);
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        const int64_t first = tile * TILE;
        const int count = min_of(TILE, p.length - first);
        load_rows(p, d, d.B, b, first, count, p.states, B);
        load_rows(p, d, d.C, b, first, count, p.states, C);
        if (!d.dt.data) load_rows(p, d, d.dt_r, b, first, count, d.rank, dt_r);
        std::memset(static_cast<void*>(folded), 0, TILE * folds * sizeof(vec));
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t channel = (group.first_block + k) * WIDTH;
            const int lanes = min_of(WIDTH, p.channels - channel);
            const float* kept = d.checkpoints + (b * tiles + tile) * p.states * p.channels + channel;
            for (int64_t n = 0; n < states; ++n) {
                h[n] = n < p.states ? load_lanes(kept + n * p.channels, lanes) : vec{};
                rates[n] = load(w.A + n * padded + channel);
                dA[n] = load(parameters + n * padded + channel);
            }
            load_block(p, d, d.x, b, first, count, channel, lanes, x);
            raw_steps(p, d, w, padded, b, first, count, channel, lanes, dt_r, steps);
            const vec direct = d.D ? load_some(d.D + channel, lanes) : vec{};
            for (int t = 0; t < count; ++t) {
                if (d.softplus) {
                    slopes[t] = sigmoid_of(steps[t]);
                    steps[t] = softplus_of(steps[t]);
                }
                drive[t] = steps[t] * x[t];
                y[t] = direct * x[t];
                g.ddt[t] = g.dinput[t] = vec{};
            }
            load_block(p, d, p.y, b, first, count, channel, lanes, dscan);
            for (int t = 0; t < count; ++t) dscan[t] *= p.scale;
            if (p.z.data) {
                load_block(p, d, p.z, b, first, count, channel, lanes, dgate);
                for (int t = 0; t < count; ++t) {
                    const vec sigmoid = sigmoid_of(dgate[t]), gate = dgate[t];
                    dgate[t] = dscan[t] * sigmoid * (1.0f + gate * (1.0f - sigmoid));
                    dscan[t] *= gate * sigmoid;
                }
            }
            Ahead ahead;
            const int64_t next_first = k + 1 < blocks ? first : first - TILE;
            if (next_first >= 0 && next_first + TILE <= p.length) {
                const int64_t next = (k + 1 < blocks ? channel : group.first_block * WIDTH - WIDTH) + WIDTH;
                ahead.add(p, d, d.x, b, next_first, next);
                ahead.add(p, d, d.dt, b, next_first, next);
                ahead.add(p, d, p.y, b, next_first, next);
                ahead.add(p, d, p.z, b, next_first, next);
                ahead.add(p, d, d.dx, b, next_first, next);
            }
            for (int64_t n = 0; n < states; n += 4) {
                scan_states_backward(count, steps, drive, dscan, B + n, C + n, states, rates + n, h + n,
                                     lam + k * states + n, dA + n, y, g.dB + n / 4, g.dC + n / 4, g, ahead);
                ahead.count = 0;
            }
            for (int64_t n = 0; n < states; ++n) store(parameters + n * padded + channel, dA[n]);

            float* ddt_weight = parameters + states * padded + channel;
            float* dD = ddt_weight + rank * padded;
            float* ddt_bias = dD + padded;
            vec dD_sum = load(dD), ddt_bias_sum = load(ddt_bias);
            for (int t = 0; t < count; ++t) {
                vec ddt = g.ddt[t] + g.dinput[t] * x[t];
                if (d.softplus) ddt *= slopes[t];
                g.ddt[t] = ddt;
                ddt_bias_sum += ddt;
                dD_sum += dscan[t] * x[t];
                x[t] = g.dinput[t] * steps[t] + direct * dscan[t];
            }
            store(dD, dD_sum);
            store(ddt_bias, ddt_bias_sum);
            store_block(p, d, d.dx, b, first, count, channel, lanes, x);
            if (d.dt.data) {
                store_block(p, d, d.ddt, b, first, count, channel, lanes, g.ddt);
            } else {
                for (int64_t r = 0; r < rank; r += 4) {
                    vec weight[4], sum[4];
                    for (int q = 0; q < 4; ++q) {
                        weight[q] = load(w.dt_weight + (r + q) * padded + channel);
                        sum[q] = load(ddt_weight + (r + q) * padded);
                    }
                    for (int t = 0; t < count; ++t) {
                        vec share[4];
                        for (int q = 0; q < 4; ++q) {
                            sum[q] += g.ddt[t] * dt_r[t * rank + r + q];
                            share[q] = g.ddt[t] * weight[q];
                        }
                        ddt_r[(t * rank + r) / 4] += fold_lanes(share);
                    }
                    for (int q = 0; q < 4; ++q) store(ddt_weight + (r + q) * padded, sum[q]);
                }
            }
            if (p.z.data) {
                for (int t = 0; t < count; ++t) y[t] *= dgate[t];
                if (!first_direction)
                    for (int t = 0; t < count; ++t) y[t] += dz_sums[token_of(d, first + t, p.length) * blocks + k];
                if (last_direction)
                    store_block(p, d, p.dz, b, first, count, channel, lanes, y);
                else
                    for (int t = 0; t < count; ++t) dz_sums[token_of(d, first + t, p.length) * blocks + k] = y[t];
            }
        }
        for (int t = 0; t < count; ++t) {
            float* row = dprojected_part + token_of(d, first + t, p.length) * columns;
            unfold_row(ddt_r + t * rank / 4, d.rank, row);
            unfold_row(g.dB + t * states / 4, p.states, row + d.rank);
            unfold_row(g.dC + t * states / 4, p.states, row + d.rank + p.states);
        }
    }
    if (d.dinitial_state)
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t channel = (group.first_block + k) * WIDTH;
            store_states(d.dinitial_state, b, p, channel, min_of(WIDTH, p.channels - channel), lam + k * states);
        }
}

int64_t backward_scratch(const ScanProblem& p, int64_t blocks) {
    const int64_t states = fours(p.states), rank = widest_rank(p);
    int64_t vectors = (blocks + 3) * states + 9 * TILE + TILE * (rank + 2 * states) / 4 + (2 * TILE + 1) * 4;
    vectors += TILE * (rank + 2 * states) / WIDTH;
    return vectors * WIDTH;
}

// Adds the samples' sums of the parameters' gradients in order and writes them as the caller wants them.
void finish_parameters(const ScanProblem& p, const ScanDirection& d, int64_t padded, const float* sums) {
    const int64_t rows = parameter_rows(p, d), first_rank = fours(p.states), row_of_D = rows - 2;
    const auto total = [&](int64_t row, int64_t c) {
        float sum = 0;
        for (int64_t b = 0; b < p.batch; ++b) sum += sums[(b * rows + row) * padded + c];
        return sum;
    };
    for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t n = 0; n < p.states; ++n) d.dA[c * p.states + n] = total(n, c);
        for (int64_t r = 0; r < d.rank; ++r) d.ddt_weight[c * d.rank + r] = total(first_rank + r, c);
        if (d.dD) d.dD[c] = total(row_of_D, c);
        if (d.ddt_bias) d.ddt_bias[c] = total(row_of_D + 1, c);
    }
}

}  // namespace

extern "C" int vim_checkpoint_length() { return TILE; }

extern "C" int vim_vector_width() { return WIDTH; }

extern "C" int vim_scan_forward(const ScanProblem* problem) {
    const ScanProblem& p = *problem;
    const int64_t padded = ceil_div(p.channels, WIDTH) * WIDTH;
    const int64_t groups = count_groups(p), widest = ceil_div(ceil_div(p.channels, WIDTH), groups);
    int64_t size = 0;
    for (int32_t i = 0; i < p.num_directions; ++i) size += weights_size(p, p.directions[i], padded);
    Scratch shared(size);
    if (!shared.ok()) return OUT_OF_MEMORY;
    Weights weights[2];
    float* memory = shared.floats();
    for (int32_t i = 0; i < p.num_directions; ++i) {
        weights[i] = transpose_weights(p, p.directions[i], padded, memory);
        memory += weights_size(p, p.directions[i], padded);
    }
    int status = OK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads)
    for (int64_t task = 0; task < p.batch * groups; ++task) {
        Scratch scratch(forward_scratch(p, widest));
        if (!scratch.ok()) {
#pragma omp atomic write
            status = OUT_OF_MEMORY;
            continue;
        }
        FlushDenormals flush;
        forward_task(p, weights, padded, task / groups, group_of(task % groups, groups, p.channels), scratch);
    }
    return status;
}

extern "C" int vim_scan_backward(const ScanProblem* problem) {
    const ScanProblem& p = *problem;
    const int64_t padded = ceil_div(p.channels, WIDTH) * WIDTH;
    const int64_t groups = count_groups(p), widest = ceil_div(ceil_div(p.channels, WIDTH), groups);
    // Shared: the transposed parameters, every sample's parameter gradients, every group's share of dprojected.
    int64_t weight_offset[2] = {}, sum_offset[2] = {}, part_offset[2] = {}, size = 0;
    for (int32_t i = 0; i < p.num_directions; ++i) {
        const ScanDirection& d = p.directions[i];
        weight_offset[i] = size, size += weights_size(p, d, padded);
        sum_offset[i] = size, size += p.batch * parameter_rows(p, d) * padded;
        part_offset[i] = size, size += groups > 1 ? p.batch * groups * p.length * (d.rank + 2 * p.states) : 0;
    }
    Scratch shared(size);
    if (!shared.ok()) return OUT_OF_MEMORY;
    Weights weights[2];
    for (int32_t i = 0; i < p.num_directions; ++i)
        weights[i] = transpose_weights(p, p.directions[i], padded, shared.floats() + weight_offset[i]);
    int status = OK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads)
    for (int64_t task = 0; task < p.batch * groups; ++task) {
        const int64_t b = task / groups;
        const Group group = group_of(task % groups, groups, p.channels);
        const bool keep_dz = p.num_directions == 2 && p.z.data;
        Scratch dz_sums(keep_dz ? p.length * widest * WIDTH : 0);
        FlushDenormals flush;
        for (int32_t i = 0; i < p.num_directions; ++i) {
            const ScanDirection& d = p.directions[i];
            Scratch scratch(backward_scratch(p, widest));
            if (!scratch.ok() || !dz_sums.ok()) {
#pragma omp atomic write
                status = OUT_OF_MEMORY;
                break;
            }
            const int64_t columns = d.rank + 2 * p.states;
            float* part = groups > 1 ? shared.floats() + part_offset[i] + task * p.length * columns
                                     : d.dprojected + b * p.length * columns;
            backward_task(p, d, weights[i], padded, b, group, i == 0, i + 1 == p.num_directions,
                          reinterpret_cast<vec*>(dz_sums.floats()),
                          shared.floats() + sum_offset[i] + b * parameter_rows(p, d) * padded, part, scratch);
        }
    }
    if (status != OK) return status;
    for (int32_t i = 0; i < p.num_directions; ++i) {
        const ScanDirection& d = p.directions[i];
        finish_parameters(p, d, padded, shared.floats() + sum_offset[i]);
        if (groups == 1) continue;
        const int64_t size_of_part = p.length * (d.rank + 2 * p.states);
#pragma omp parallel for schedule(static) num_threads(p.num_threads) collapse(2)
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t chunk = 0; chunk < ceil_div(size_of_part, 4096); ++chunk)
                for (int64_t j = chunk * 4096; j < min_of(chunk * 4096 + 4096, size_of_part); ++j) {
                    const float* parts = shared.floats() + part_offset[i] + b * groups * size_of_part + j;
                    float total = 0;
                    for (int64_t group = 0; group < groups; ++group) total += parts[group * size_of_part];
                    d.dprojected[b * size_of_part + j] = total;
                }
    }
    return status;
}
