// Force, Jacobian products and triangular solves of the equilibrium block F(z) = x - decay z + Attn(LN z) + FFN(LN z), float32.
//
// With n = (z - mean) / sigma and the gains of both LayerNorms folded into the weights, a token costs two products,
//
//     (q, k, v, h) = In n + bias        F = x - decay z + Out (attention(q, k, v), gelu(h))
//
// and so does each product with J or its transpose. Gates are folded into Out, the decay is one number a channel. Attention is
// softmax attention, of queries and keys over their root mean square where `qk_norm` says so, or linear attention over all
// tokens: with features phi(h) = elu(h) + 1 of queries and keys its weights are phi(q) phi(k), shared out. Tokens are the rows
// of small matrices whose products run in registers.
//
// `Free` and `Adjoint` solve by substitution: a unit of `chunk` tokens is taken to its fixed point by Anderson's method with
// everything it depends on already settled, tokens before it in the free phase, tokens after it in the adjoint. A non-causal
// block is one unit; without memory the method is plain relaxation. Every row is summed in the same order whatever its
// neighbours, so results do not depend on threads.
//
// Vectors are the compiler's own (vector_size), as wide as the target it compiles for.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ints __attribute__((vector_size(4 * LANES), aligned(4)));
constexpr int PANEL = 2 * LANES;     // columns of a packed weight that are computed at once
constexpr float EPS = 1e-5f;         // of the normalisations
constexpr float SCALE = 1.5957691f;  // of tanh-GELU as a logistic function: 2 sqrt(2 / pi)
constexpr float CUBIC = SCALE * 0.044715f;
constexpr int MEMORY = 16;            // most differences that Anderson keeps
constexpr float STALL = 10;          // residual over its lowest at which acceleration is given up
constexpr float GROWTH = 1e3f;       // a state or residual this many times its scale has diverged
constexpr int ROWS = 24;             // rows of a product that are computed together
constexpr int HELD = LANES == 16 ? 8 : 6;  // rows of two vectors whose sums are held in registers; AVX-512 has 32 of them
constexpr int DEPTH = 256;           // terms of a product that are summed in registers at once
constexpr int QUERIES = 256;         // whose attention weights and their slopes a thread has at once

static int padded(int n) { return (n + PANEL - 1) / PANEL * PANEL; }
static vec &at(float *p) { return *reinterpret_cast<vec *>(p); }
static const vec &at(const float *p) { return *reinterpret_cast<const vec *>(p); }
static vec all(float a) { return vec{} + a; }

// The numbers of a vector put together, one half with the other.
template <int N>
struct Part {
    typedef float type __attribute__((vector_size(4 * N)));
};

template <int N, class Join>
static inline float joined(typename Part<N>::type a, Join join) {
    if constexpr (N == 1) {
        return a[0];
    } else {
        typename Part<N / 2>::type low, high;
        std::memcpy(&low, &a, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char *>(&a) + sizeof low, sizeof high);
        return joined<N / 2>(join(low, high), join);
    }
}

static float total(vec a) { return joined<LANES>(a, [](auto one, auto other) { return one + other; }); }
static float largest(vec a) { return joined<LANES>(a, [](auto one, auto other) { return one > other ? one : other; }); }

// sum of terms(i) for i < n, by vectors and, at the end, by numbers: two sums, since each waits for its last addition
template <class Vectors, class Numbers>
static inline float gathered(int n, Vectors vectors, Numbers numbers) {
    vec even{}, odd{};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) even += vectors(i), odd += vectors(i + LANES);
    if (i + LANES <= n) even += vectors(i), i += LANES;
    float rest = 0;
    for (; i < n; i++) rest += numbers(i);
    return total(even + odd) + rest;
}

static float dot(int n, const float *a, const float *b) {
    return gathered(n, [&](int i) { return at(a + i) * at(b + i); }, [&](int i) { return a[i] * b[i]; });
}

static float sum(int n, const float *a) {
    return gathered(n, [&](int i) { return at(a + i); }, [&](int i) { return a[i]; });
}

static void axpy(int n, float a, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

// e^x to 2 units in the last place: 2^i times a polynomial on |f| <= 1/2. Adding 1.5 * 2^23 rounds to the integer i, which is
// then in the low bits.
static vec exponential(vec x) {
    vec t = x * 1.44269504f;
    t = t > 80.f ? all(80.f) : t;  // no weight is ever denormal
    t = t < -80.f ? all(-80.f) : t;
    const vec shifted = t + 12582912.f;
    const vec f = t - (shifted - 12582912.f);
    vec p = f * 1.5353362e-4f + 1.3398874e-3f;
    p = p * f + 9.6184374e-3f;
    p = p * f + 5.5503325e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
    p = p * f + 1.f;
    ints power;
    std::memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + (127 << 23);
    vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// elu(h) + 1, whose slope is the smaller of itself and 1
static vec feature(vec h) { return h > 0.f ? h + 1.f : exponential(h); }

// 1 / a for a >= 1 to 2 units in the last place: Newton's method, without a division, from 6 % off, which the bits of a give.
static vec reciprocal(vec a) {
    ints bits;
    std::memcpy(&bits, &a, sizeof bits);
    bits = 0x7ef127ea - bits;
    vec found;
    std::memcpy(&found, &bits, sizeof found);
    for (int i = 0; i < 3; i++) found *= 2.f - a * found;
    return found;
}

static vec gate(vec h) { return reciprocal(1.f + exponential(-(h * h * CUBIC + SCALE) * h)); }

// The shape of the block; mirrored by ctypes.
struct Shape {
    int tokens, width, heads, hidden, causal, linear, qk_norm;
    const float *decay;  // (C)
};

// What a linearisation keeps of each sample, (samples, ...): n (T, C), 1 / sigma (T), queries, keys and values (H, T, D), keys
// and values once more in tiles of tokens (H, padded T / PANEL, D, PANEL), attention weights (H, T, padded T), or null where
// they are made anew when needed, one over their sum before they were shared out and the largest score (H, T, 2), the input of
// `Out` (T, C + E): attention and gelu(h), and the slope of gelu (T, E), which holds h itself until the unit is settled. Of
// linear attention q and k are the features; with qk_norm they are normalised, and 1 / rms of the query and of the key
// (H, T, 2) is kept.
struct Cache {
    float *n, *inverse, *q, *k, *v, *k_tiles, *v_tiles, *weights, *share, *out, *slope, *rms;
};

struct Solver {
    int chunk, max_steps, memory;
    float step, tol;
};

// Sums of one sample over its tokens, as the solves return them.
struct Outcome {
    float squares, allowed;  // of the force: what it has, and what its settled tokens were allowed
    float rate;              // the last ratio of successive residuals, the largest of its units; 0 before there is one
    int evaluations, fallbacks, diverged;  // of tokens; of units; 1 grown a thousandfold, 2 not finite
};

// Terms begin..end of y (R, P panels) = x (R, inner) W: R rows against P panels, `apart` numbers from one panel to the next,
// all in registers; later terms are added to earlier ones.
template <int R, int P>
static inline void block(int begin, int end, const float *const *rows, const float *w, size_t apart, float *y, int ldy) {
    const float *x[R];
    for (int r = 0; r < R; r++) x[r] = rows[r];
    vec sum[R][2 * P];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2 * P; v++) sum[r][v] = begin ? at(y + r * ldy + v * LANES) : vec{};
    for (int k = begin; k < end; k++) {
        vec b[2 * P];
        for (int v = 0; v < 2 * P; v++) b[v] = at(w + k * PANEL + v / 2 * apart + v % 2 * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2 * P; v++) sum[r][v] += x[r][k] * b[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2 * P; v++) at(y + r * ldy + v * LANES) = sum[r][v];
}

// y (rows, padded columns) = x (rows, inner) W, W packed in panels of columns. Blocks of x and of a panel stay in the fastest
// cache. Each sum runs over k in the same order whatever the rows beside it.
static void multiply(int rows, int inner, int columns, const float *const *x, const float *w, float *y) {
    const int wide = padded(columns), panels = wide / PANEL;
    const size_t apart = size_t(inner) * PANEL;
    for (int top = 0; top < rows; top += ROWS)
        for (int begin = 0; begin < inner; begin += DEPTH) {
            const int stop = std::min(inner, begin + DEPTH), end = std::min(rows, top + ROWS);
            for (int j = 0; j < panels; j += 2) {
                const float *panel = w + j * apart;
                float *to = y + j * PANEL;
                const int both = std::min(2, panels - j);
                int r = top;
                for (; r + HELD <= end; r += HELD)
                    for (int q = 0; q < both; q++)
                        block<HELD, 1>(begin, stop, x + r, panel + q * apart, apart, to + r * wide + q * PANEL, wide);
                for (; r + 2 <= end && both == 2; r += 2) block<2, 2>(begin, stop, x + r, panel, apart, to + r * wide, wide);
                for (; r < end && both == 2; r++) block<1, 2>(begin, stop, x + r, panel, apart, to + r * wide, wide);
                for (; r < end; r++) block<1, 1>(begin, stop, x + r, panel, apart, to + r * wide, wide);
            }
        }
}

// to (R rows, a panel) += sum over k < count of a_k b_k^T, both packed.
template <int R>
static inline void outer(int count, const float *a, const float *b, float *to, int ldt) {
    vec sum[R][2];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = at(to + r * ldt + v * LANES);
    for (int k = 0; k < count; k++, a += R, b += PANEL)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) sum[r][v] += a[r] * at(b + v * LANES);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) at(to + r * ldt + v * LANES) = sum[r][v];
}

// Rows begin..end of to (A, padded B) = sum over k < count of a_k b_k^T, a (count, A) and b (count, B). Few k at a time, so
// that what is summed over stays in the fastest caches; each sum runs over k in the same order whatever the rows beside it.
static void outer_products(int count, int A, int B, const float *a, const float *b, int begin, int end, float *to) {
    constexpr int TERMS = 128;
    const int wide = padded(B);
    std::vector<float> panel(TERMS * PANEL), stripe(TERMS * (end - begin));
    auto strips = [&](auto work) {  // work(row, rows at once, where they are packed)
        int r = begin;
        for (; r + HELD <= end; r += HELD) work(r, std::integral_constant<int, HELD>(), &stripe[(r - begin) * TERMS]);
        for (; r < end; r++) work(r, std::integral_constant<int, 1>(), &stripe[(r - begin) * TERMS]);
    };
    std::fill(to + size_t(begin) * wide, to + size_t(end) * wide, 0.f);
    for (int k = 0; k < count; k += TERMS) {
        const int terms = std::min(TERMS, count - k);
        strips([&](int r, auto rows, float *to) {
            for (int i = 0; i < terms; i++) std::copy_n(a + size_t(k + i) * A + r, rows(), to + i * rows());
        });
        for (int j = 0; j < wide; j += PANEL) {
            for (int i = 0; i < terms; i++) std::copy_n(b + size_t(k + i) * B + j, std::min(PANEL, B - j), &panel[i * PANEL]);
            strips([&](int r, auto rows, const float *packed) {
                outer<rows()>(terms, packed, panel.data(), to + size_t(r) * wide + j, wide);
            });
        }
    }
}

template <class Entry>
static float *pack(int inner, int columns, float *to, Entry entry) {
    for (int j = 0; j < padded(columns); j += PANEL)
        for (int k = 0; k < inner; k++)
            for (int c = j; c < j + PANEL; c++) *to++ = c < columns ? entry(k, c) : 0.f;
    return to;
}

// The four packed matrices and the bias behind one pointer.
struct Packed {
    const float *in, *out, *out_t, *in_t, *bias;
    Packed(const Shape &s, const float *p) {
        const int C = s.width, E = s.hidden;
        in = p, p += C * padded(3 * C + E);
        out = p, p += (C + E) * padded(C);
        out_t = p, p += C * padded(C + E);
        in_t = p, p += (3 * C + E) * padded(C);
        bias = p;
    }
};

// work() on so many threads: OpenMP's, which are PyTorch's own where both use the same library, so that neither waits in a loop
// on the other's core; else new ones.
template <class Work>
static void parallel(int threads, Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    work();
    return;
#endif
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(work);
    work();
    for (auto &other : others) other.join();
}

// sum over s < count of weight_s * row_s, weights `step` and rows of `size` numbers `stride` apart, in registers where the size
// allows.
template <int V>
static void mix(int count, const float *weight, int step, const float *row, int stride, float *to) {
    vec even[V], odd[V];  // two sums, since each waits for its last addition
    for (int v = 0; v < V; v++) even[v] = odd[v] = vec{};
    int s = 0;
    for (; s + 2 <= count; s += 2, row += 2 * stride, weight += 2 * step)
        for (int v = 0; v < V; v++) {
            even[v] += weight[0] * at(row + v * LANES);
            odd[v] += weight[step] * at(row + stride + v * LANES);
        }
    if (s < count)
        for (int v = 0; v < V; v++) even[v] += *weight * at(row + v * LANES);
    for (int v = 0; v < V; v++) at(to + v * LANES) = even[v] + odd[v];
}

static void mixture(int count, int size, const float *weight, int step, const float *row, int stride, float *to) {
    switch (size % LANES ? 0 : size / LANES) {
        case 1: return mix<1>(count, weight, step, row, stride, to);
        case 2: return mix<2>(count, weight, step, row, stride, to);
        case 4: return mix<4>(count, weight, step, row, stride, to);
        case 8: return mix<8>(count, weight, step, row, stride, to);
    }
    std::fill(to, to + size, 0.f);
    for (int s = 0; s < count; s++) axpy(size, weight[s * step], row + s * stride, to);
}

// row_s += weight_s * a + weight'_s * a' for s < count, rows of `size` numbers `stride` apart.
template <int V>
static void spread_in_registers(int count, const float *weight, const float *a, const float *weight_2, const float *a_2,
                                float *row, int stride) {
    vec held[V], held_2[V];
    for (int v = 0; v < V; v++) held[v] = at(a + v * LANES), held_2[v] = at(a_2 + v * LANES);
    for (int s = 0; s < count; s++, row += stride)
        for (int v = 0; v < V; v++) at(row + v * LANES) += weight[s] * held[v] + weight_2[s] * held_2[v];
}

static void spread(int count, int size, const float *weight, const float *a, const float *weight_2, const float *a_2,
                   float *row, int stride) {
    switch (size % LANES ? 0 : size / LANES) {
        case 1: return spread_in_registers<1>(count, weight, a, weight_2, a_2, row, stride);
        case 2: return spread_in_registers<2>(count, weight, a, weight_2, a_2, row, stride);
        case 4: return spread_in_registers<4>(count, weight, a, weight_2, a_2, row, stride);
    }
    for (int s = 0; s < count; s++, row += stride) axpy(size, weight[s], a, row), axpy(size, weight_2[s], a_2, row);
}

// sum over d < size of a_d * tile_d for all s < count, rounded up to whole tiles; size is a multiple of 4.
static void scores(int count, int size, const float *a, const float *tile, float *to) {
    for (int s = 0; s < count; s += PANEL) {
        vec sum[8] = {};
        for (int d = 0; d < size; d += 4, tile += 4 * PANEL)
            for (int v = 0; v < 8; v++) sum[v] += a[d + v / 2] * at(tile + v * LANES);
        at(to + s) = (sum[0] + sum[2]) + (sum[4] + sum[6]);
        at(to + s + LANES) = (sum[1] + sum[3]) + (sum[5] + sum[7]);
    }
}

// Rows of one group of units and the work memory of the passes over them, which have attention weights and their slopes of so
// many rows at once.
struct Pass {
    const Shape &s;
    const Packed &p;
    const Cache &cache;
    const int T, C, H, E, D, N, TP, queries;  // N: columns of In; TP: padded tokens
    const float root;
    std::vector<const float *> x;  // rows of a product
    std::vector<float> &wide, &narrow, &slopes, &push, &made;

    Pass(const Shape &s, const Packed &p, const Cache &cache, int rows, int most = QUERIES)
        : s(s), p(p), cache(cache), T(s.tokens), C(s.width), H(s.heads), E(s.hidden), D(C / H), N(3 * C + E), TP(padded(T)),
          queries(std::min(rows, most)), root(1 / std::sqrt(float(D))), x(rows), wide(kept<0>(size_t(rows) * padded(N))),
          narrow(kept<1>(size_t(rows) * padded(C))), slopes(kept<2>(size_t(queries) * H * TP)),
          push(kept<3>(size_t(rows) * C)), made(kept<5>(cache.weights ? 0 : size_t(queries) * H * TP)) {}

    // Memory that a thread keeps from one call to the next: fresh pages cost more than what is computed in them.
    template <int Name>
    static std::vector<float> &kept(size_t size) {
        static thread_local std::vector<float> memory;
        if (memory.size() < size) memory.resize(size);
        return memory;
    }

    int reach(int t) const { return s.causal ? t + 1 : T; }  // tokens that t attends to

    void normalise(const float *z, float *n, float *inverse) const {
        const float mean = sum(C, z) / C;
        for (int i = 0; i < C; i++) n[i] = z[i] - mean;
        *inverse = 1 / std::sqrt(dot(C, n, n) / C + EPS);
        for (int i = 0; i < C; i++) n[i] *= *inverse;
    }

    // to = (v - mean v - n mean(n v)) / sigma: the slope of n, which is symmetric
    void normalise_slope(const float *v, const float *n, float inverse, float *to) const {
        const float mean = sum(C, v) / C;
        const float along = dot(C, n, v) / C;
        for (int i = 0; i < C; i++) to[i] = inverse * (v[i] - mean - n[i] * along);
    }

    struct Row {
        int sample, token;
    };

    size_t place(Row r) const { return size_t(r.sample) * T + r.token; }
    size_t row(Row r, int h) const { return ((size_t(r.sample) * H + h) * T + r.token) * D; }  // of q, k, v
    size_t tiles(int sample, int h) const { return (size_t(sample) * H + h) * D * TP; }
    // what one token has in a head (D), into its place in the tiles
    void tile(Row r, int h, const float *from, float *to) const {
        to += tiles(r.sample, h) + r.token / PANEL * D * PANEL + r.token % PANEL;
        for (int d = 0; d < D; d++) to[d * PANEL] = from[d];
    }
    size_t query(Row r, int h) const { return (size_t(r.sample) * H + h) * T + r.token; }

    // The attention weights of a row: those that are kept, or room for them
    float *weights(Row r, int h, float *room) const { return cache.weights ? cache.weights + query(r, h) * TP : room; }

    // The same, once `force` has been there: where they are not kept they are made anew, bit for bit.
    const float *weights_again(Row r, int h, float *room) const {
        float *w = weights(r, h, room);
        if (cache.weights) return w;
        const int count = reach(r.token);
        const float share = cache.share[2 * query(r, h)], top = cache.share[2 * query(r, h) + 1];
        scores(count, D, cache.q + row(r, h), cache.k_tiles + tiles(r.sample, h), w);
        int end = 0;
        for (; end < count; end += LANES)
            at(w + end) = (s.linear ? at(w + end) : exponential((at(w + end) - top) * root)) * share;
        std::fill(w + count, w + end, 0.f);
        return w;
    }

    // Where they and their slopes are of row i of a pass over `rows` whose present queries begin at `begin`
    size_t place_of_query(int rows, int begin, int i, int h) const {
        return (size_t(h) * std::min(queries, rows - begin) + i - begin) * TP;
    }

    // What the scores of a query do to its weights w, but for what they all lose to the sum.
    vec growth(Row r, int h, const float *w) const { return s.linear ? all(cache.share[2 * query(r, h)]) : at(w) * root; }

    // From a change of queries and keys (2 C) to that of their features or of what is normalised, or back.
    void through_features(Row r, float *to) const {
        if (s.qk_norm)
            for (int h = 0; h < H; h++)
                for (int part = 0; part < 2; part++) {
                    const float *n = (part ? cache.k : cache.q) + row(r, h), inverse = cache.rms[2 * query(r, h) + part];
                    float *change = to + part * C + h * D;
                    const float along = dot(D, n, change) / D;
                    for (int d = 0; d < D; d++) change[d] = inverse * (change[d] - n[d] * along);
                }
        if (!s.linear) return;
        for (int h = 0; h < H; h++)
            for (int d = 0; d < D; d++) {
                to[h * D + d] *= std::min(1.f, cache.q[row(r, h) + d]);
                to[C + h * D + d] *= std::min(1.f, cache.k[row(r, h) + d]);
            }
    }

    // work(row, head) of rows begin..stop, those of one sample in turn for each head, so that its keys and values stay in the
    // fastest cache
    template <class Work>
    void by_head(const std::vector<Row> &rows, int begin, int stop, Work work) const {
        for (int end; begin < stop; begin = end) {
            for (end = begin + 1; end < stop && rows[end].sample == rows[begin].sample;) end++;
            for (int h = 0; h < H; h++)
                for (int i = begin; i < end; i++) work(i, h);
        }
    }

    // Force of the rows at states z(i) under the clamp x(i), both (C), into `push`; fills the cache at these tokens.
    template <class State, class Clamp>
    void force(const std::vector<Row> &rows, State state, Clamp clamp) {
        const int R = rows.size(), NP = padded(N), CP = padded(C);
        for (int i = 0; i < R; i++) {
            const size_t at = place(rows[i]);
            normalise(state(i), cache.n + at * C, cache.inverse + at);
            x[i] = cache.n + at * C;
        }
        multiply(R, C, N, x.data(), p.in, wide.data());
        for (int i = 0; i < R; i++) {
            float *y = &wide[size_t(i) * NP];
            for (int j = 0; j < 3 * C; j++) y[j] += p.bias[j];
            if (s.linear)
                for (int j = 0; j < 2 * C; j += LANES) at(y + j) = feature(at(y + j));
            for (int j = 0; j < 2 * H && s.qk_norm; j++) {
                float *one = y + j * D, &inverse = cache.rms[2 * query(rows[i], j % H) + j / H];
                inverse = 1 / std::sqrt(dot(D, one, one) / D + EPS);
                for (int d = 0; d < D; d++) one[d] *= inverse;
            }
            for (int h = 0; h < H; h++) {
                const size_t to = row(rows[i], h);
                std::copy_n(y + h * D, D, cache.q + to);
                std::copy_n(y + C + h * D, D, cache.k + to);
                std::copy_n(y + 2 * C + h * D, D, cache.v + to);
                tile(rows[i], h, cache.k + to, cache.k_tiles);
            }
            float *kept = cache.slope + place(rows[i]) * E, *out = cache.out + place(rows[i]) * (C + E) + C;
            for (int j = 0; j < E; j += LANES) {
                const vec hidden = at(y + 3 * C + j) + at(p.bias + 3 * C + j);
                at(kept + j) = hidden;
                at(out + j) = hidden * gate(hidden);
            }
        }
        by_head(rows, 0, R, [&](int i, int h) {
            const Row r = rows[i];
            const int count = reach(r.token);
            float *out = cache.out + place(r) * (C + E), *w = weights(r, h, made.data());
            scores(count, D, cache.q + row(r, h), cache.k_tiles + tiles(r.sample, h), w);
            int end = count;
            for (; end % LANES; end++) w[end] = s.linear ? 0 : -INFINITY;
            vec sum{};
            float top = 0;
            if (s.linear) {
                for (int j = 0; j < end; j += LANES) sum += at(w + j);
            } else {
                vec most = at(w);
                for (int j = LANES; j < end; j += LANES) most = at(w + j) > most ? at(w + j) : most;
                top = largest(most);
                for (int j = 0; j < end; j += LANES) sum += at(w + j) = exponential((at(w + j) - top) * root);
                for (int j = count; j < end; j++) w[j] = 0;  // 2^-80 in a sum of at least 1 is nothing
            }
            const float share = cache.share[2 * query(r, h)] = 1 / total(sum);
            cache.share[2 * query(r, h) + 1] = top;
            for (int j = 0; j < end; j += LANES) at(w + j) *= share;
            mixture(count, D, w, 1, cache.v + row({r.sample, 0}, h), D, out + h * D);
            x[i] = out;
        });
        multiply(R, C + E, C, x.data(), p.out, narrow.data());
        for (int i = 0; i < R; i++) {
            const float *z = state(i), *drive = clamp(i), *moved = &narrow[size_t(i) * CP];
            for (int j = 0; j < C; j++) push[i * C + j] = drive[j] - s.decay[j] * z[j] + moved[j];
        }
    }

    // What the products need besides: the slope of gelu in place of h, and the values with the tokens last.
    void linearise(Row r) const {
        float *slope = cache.slope + place(r) * E;
        for (int j = 0; j < E; j += LANES) {
            const vec h = at(slope + j), g = gate(h);
            at(slope + j) = g + g * (1.f - g) * h * (SCALE + 3 * CUBIC * h * h);
        }
        for (int h = 0; h < H; h++) tile(r, h, cache.v + row(r, h), cache.v_tiles);
    }

    // J^T u of rows that belong to whole units, u(i) (C), into `push`. The derivatives in (q, k, v, h) end in back(i) (N),
    // which holds on entry what tokens outside the unit send to k and v. first(i): first token of the row's unit; rows of a
    // unit are consecutive.
    template <class State, class Back, class First>
    void transposed(const std::vector<Row> &rows, State u, Back back, First first) {
        const int R = rows.size(), OP = padded(C + E), CP = padded(C);
        std::vector<float> sums(D);
        float *sum = sums.data();
        for (int i = 0; i < R; i++) x[i] = u(i);
        multiply(R, C, C + E, x.data(), p.out_t, wide.data());
        for (int i = 0; i < R; i++) {
            const float *y = &wide[size_t(i) * OP] + C, *slope = cache.slope + place(rows[i]) * E;
            float *to = back(i) + 3 * C;
            for (int j = 0; j < E; j += LANES) at(to + j) = at(y + j) * at(slope + j);
        }
        for (int begin = 0; begin < R; begin += queries) {
            const int stop = std::min(R, begin + queries);
            auto ready = [&](int i, int h) { return place_of_query(R, begin, i, h); };
            by_head(rows, begin, stop, [&](int i, int h) {
                const Row r = rows[i];
                const float *drawn = &wide[size_t(i) * OP] + h * D, *out = cache.out + place(r) * (C + E);
                const float *w = weights_again(r, h, made.data() + ready(i, h));
                const int count = reach(r.token);
                float *ds = &slopes[ready(i, h)];
                scores(count, D, drawn, cache.v_tiles + tiles(r.sample, h), ds);
                const float along = dot(D, drawn, out + h * D);
                for (int j = 0; j < count; j += LANES) at(ds + j) = growth(r, h, w + j) * (at(ds + j) - along);
                mixture(count, D, ds, 1, cache.k + row({r.sample, 0}, h), D, back(i) + h * D);
            });
            by_head(rows, 0, s.causal ? stop : R, [&](int i, int h) {  // what queries of its own unit send to a token's k and v
                const Row r = rows[i];
                const int start = i - (r.token - first(i)), from = std::max(begin, s.causal ? i : start);
                int end = from;
                while (end < stop && first(end) == first(i) && rows[end].sample == r.sample) end++;
                if (end == from) return;
                float *to = back(i) + C + h * D;
                const float *w = weights(rows[from], h, made.data() + ready(from, h)) + r.token;
                mixture(end - from, D, &slopes[ready(from, h)] + r.token, TP, cache.q + row(rows[from], h), D, sum);
                axpy(D, 1, sum, to);
                mixture(end - from, D, w, TP, &wide[size_t(from) * OP + h * D], OP, sum);
                axpy(D, 1, sum, to + C);
            });
        }
        for (int i = 0; i < R; i++) {
            x[i] = back(i);
            through_features(rows[i], back(i));
        }
        multiply(R, N, C, x.data(), p.in_t, narrow.data());
        for (int i = 0; i < R; i++) {
            const size_t at = place(rows[i]);
            const float *from = u(i);
            float *to = &push[i * C];
            normalise_slope(&narrow[size_t(i) * CP], cache.n + at * C, cache.inverse[at], to);
            for (int j = 0; j < C; j++) to[j] -= s.decay[j] * from[j];
        }
    }

    // J v of rows that make whole samples, v(i) (C), into `push`. own: of each row's token alone, J_tt v_t, the others held;
    // any rows then.
    template <bool own, class State>
    void product(const std::vector<Row> &rows, State v) {
        const int R = rows.size(), NP = padded(N), CP = padded(C);
        std::vector<float> turned(own ? 0 : size_t(C) * TP), other(std::max(TP, D)), dn(size_t(R) * C);
        std::vector<float> inputs(size_t(R) * (C + E));
        for (int i = 0; i < R; i++) {
            const size_t at = place(rows[i]);
            normalise_slope(v(i), cache.n + at * C, cache.inverse[at], &dn[i * C]);
            x[i] = &dn[i * C];
        }
        multiply(R, C, N, x.data(), p.in, wide.data());
        for (int i = 0; i < R; i++) {
            const Row r = rows[i];
            const int start = i - r.token;
            if (own) through_features(r, &wide[size_t(i) * NP]);
            else if (i == start)  // the changes of the sample's keys
                for (int t = 0; t < T; t++) {
                    float *y = &wide[size_t(start + t) * NP];
                    through_features({r.sample, t}, y);
                    for (int h = 0; h < H; h++) tile({0, t}, h, y + C + h * D, turned.data());
                }
            const float *y = &wide[size_t(i) * NP], *slope = cache.slope + place(r) * E;
            const float *out = cache.out + place(r) * (C + E);
            const int count = reach(r.token);
            float *to = &inputs[size_t(i) * (C + E)];
            x[i] = to;
            for (int h = 0; h < H; h++) {
                const float *w = weights_again(r, h, made.data());
                float *ds = slopes.data();
                scores(count, D, y + h * D, cache.k_tiles + tiles(r.sample, h), ds);
                if (own) ds[r.token] += dot(D, cache.q + row(r, h), y + C + h * D);  // no key moves but its own
                else scores(count, D, cache.q + row(r, h), &turned[tiles(0, h)], other.data());
                for (int j = 0; j < count; j += LANES)
                    at(ds + j) = growth(r, h, w + j) * (own ? at(ds + j) : at(ds + j) + at(&other[j]));
                const float sum = ::sum(count, ds);
                mixture(count, D, ds, 1, cache.v + row({r.sample, 0}, h), D, to + h * D);
                if (own) mixture(1, D, w + r.token, 1, y + 2 * C + h * D, D, other.data());
                else mixture(count, D, w, 1, &wide[size_t(start) * NP + 2 * C + h * D], NP, other.data());
                for (int d = 0; d < D; d++) to[h * D + d] += other[d] - sum * out[h * D + d];
            }
            for (int j = 0; j < E; j++) to[C + j] = y[3 * C + j] * slope[j];
        }
        multiply(R, C + E, C, x.data(), p.out, narrow.data());
        for (int i = 0; i < R; i++)
            for (int j = 0; j < C; j++) push[i * C + j] = narrow[size_t(i) * CP + j] - s.decay[j] * v(i)[j];
    }
};

// Anderson acceleration of one unit's iteration z <- z + step F (type II): the last differences of states and forces.
struct Differences {
    int size, memory, length = 0, slot = 0;
    bool begun = false;
    std::vector<float> states, pushes, last_state, last_push;
    std::vector<double> gram;

    Differences(int size, int memory) : size(size), memory(memory), states(size_t(size) * memory),
        pushes(size_t(size) * memory), last_state(size), last_push(size), gram(memory * memory) {}

    void forget() { length = slot = 0, begun = false; }

    void begin(int numbers) { size = numbers, forget(); }

    void record(const float *state, const float *push) {
        if (begun) {
            float *dz = &states[size_t(slot) * size], *df = &pushes[size_t(slot) * size];
            for (int i = 0; i < size; i++) dz[i] = state[i] - last_state[i], df[i] = push[i] - last_push[i];
            length = std::min(length + 1, memory);
            for (int j = 0; j < length; j++)
                gram[slot * memory + j] = gram[j * memory + slot] = dot(size, df, &pushes[size_t(j) * size]);
            slot = (slot + 1) % memory;
        }
        begun = true;
        std::copy_n(state, size, last_state.begin());
        std::copy_n(push, size, last_push.begin());
    }

    // state += step push - sum_i gamma_i (dz_i + step df_i), gamma minimising |push - sum_i gamma_i df_i|
    void move(float *state, const float *push, float step) const {
        axpy(size, step, push, state);
        const int m = length;
        double a[MEMORY * MEMORY], b[MEMORY], unit[MEMORY];
        for (int i = 0; i < m; i++) unit[i] = 1 / std::sqrt(std::max(gram[i * memory + i], 1e-300));
        for (int i = 0; i < m; i++) {
            for (int j = 0; j < m; j++) a[i * m + j] = gram[i * memory + j] * unit[i] * unit[j];
            a[i * m + i] += 6.4e-6;  // float spacing to the power 0.75
            b[i] = dot(size, push, &pushes[size_t(i) * size]) * unit[i];
        }
        for (int i = 0; i < m; i++)  // Gauss without pivots: the matrix is positive definite
            for (int r = i + 1; r < m; r++) {
                const double factor = a[r * m + i] / a[i * m + i];
                for (int j = i; j < m; j++) a[r * m + j] -= factor * a[i * m + j];
                b[r] -= factor * b[i];
            }
        for (int i = m - 1; i >= 0; i--) {
            for (int j = i + 1; j < m; j++) b[i] -= a[i * m + j] * b[j];
            b[i] /= a[i * m + i];
        }
        for (int i = 0; i < m; i++) {
            const float gamma = b[i] * unit[i];
            if (!std::isfinite(gamma)) continue;
            axpy(size, -gamma, &states[size_t(i) * size], state);
            axpy(size, -gamma * step, &pushes[size_t(i) * size], state);
        }
    }
};

// What a unit may leave of a residual that counts in units of scale (samples).
static float portion(const Pass &pass, const Pass::Row &row, int size, const float *scale, float tol) {
    return tol * scale[row.sample] * std::sqrt(float(size) / (pass.T * pass.C));
}

// The free phase, first token to last: F(z) = 0 with the tokens before the unit settled. A residual counts in units of |z|, or
// of scale (samples) if that is given. What is left of F goes to `rest`.
struct Free {
    static constexpr bool backwards = false, linear = false;
    const float *clamp, *scale;
    float *state, *rest;

    float limit(const Pass &pass, const Pass::Row &row, int size, const float *z, float tol) const {
        return scale ? portion(pass, row, size, scale, tol) : tol * std::sqrt(dot(size, z, z));
    }
    void evaluate(Pass &pass, const std::vector<Pass::Row> &rows, const std::vector<int> &) const {
        pass.force(rows, [&](int i) { return state + pass.place(rows[i]) * pass.C; },
                   [&](int i) { return clamp + pass.place(rows[i]) * pass.C; });
    }
    void settle(Pass &pass, const std::vector<Pass::Row> &rows, int begin, int end) const {
        for (int i = begin; i < end; i++) {
            pass.linearise(rows[i]);
            std::copy_n(&pass.push[size_t(i) * pass.C], pass.C, rest + pass.place(rows[i]) * pass.C);
        }
    }
};

// The adjoint phase, last token to first: J^T a + g = 0 with the tokens after the unit settled. back (T, N) ends with the
// derivatives in (q, k, v, h); sent (T, 2 C) collects what settled tokens send to keys and values before them.
struct Adjoint {
    static constexpr bool backwards = true, linear = true;
    const float *slope, *scale;
    float *state, *back, *sent;

    float limit(const Pass &pass, const Pass::Row &row, int size, const float *, float tol) const {
        return portion(pass, row, size, scale, tol);
    }
    void evaluate(Pass &pass, const std::vector<Pass::Row> &rows, const std::vector<int> &first) const {
        const int C = pass.C;
        for (auto row : rows) std::copy_n(sent + pass.place(row) * 2 * C, 2 * C, back + pass.place(row) * pass.N + C);
        pass.transposed(rows, [&](int i) { return state + pass.place(rows[i]) * C; },
                        [&](int i) { return back + pass.place(rows[i]) * pass.N; }, [&](int i) { return first[i]; });
        for (size_t i = 0; i < rows.size(); i++) axpy(C, 1, slope + pass.place(rows[i]) * C, &pass.push[i * C]);
    }
    void settle(Pass &pass, const std::vector<Pass::Row> &rows, int begin, int end) const {
        const int C = pass.C, D = pass.D, before = pass.s.causal ? rows[begin].token : 0;
        if (!before) return;  // else the pass has all its queries at hand
        const float *none = Pass::kept<4>(D).data();  // zeros
        for (int i = begin; i < end; i += 2)  // two rows at once: what they are added to is read and written once
            for (int h = 0; h < pass.H; h++) {
                const int j = i + 1 < end ? i + 1 : i;
                auto at_hand = [&](int k) { return pass.place_of_query(rows.size(), 0, k, h); };
                auto ds = [&](int k) { return &pass.slopes[at_hand(k)]; };
                auto w = [&](int k) { return pass.weights(rows[k], h, pass.made.data() + at_hand(k)); };
                auto q = [&](int k) { return pass.cache.q + pass.row(rows[k], h); };
                auto drawn = [&](int k) { return &pass.wide[size_t(k) * padded(C + pass.E)] + h * D; };
                float *to = sent + size_t(rows[i].sample) * pass.T * 2 * C + h * D;
                spread(before, D, ds(i), q(i), ds(j), j > i ? q(j) : none, to, 2 * C);
                spread(before, D, w(i), drawn(i), w(j), j > i ? drawn(j) : none, to + C, 2 * C);
            }
    }
};

struct Unit {
    int sample = 0, first = 0, rows = 0, steps = 0, waits = 0;
    float lowest = INFINITY, start = 0, bound = 0, step = 0, previous = 0, rate = 0;
    bool plain = false, last = false;
    Differences history;
    std::vector<float> best;
    Unit(int size, int memory) : history(size, memory), best(size) {}

    void begin(int at, int tokens, int width, float size) {
        first = at, rows = tokens, steps = waits = 0, lowest = INFINITY, previous = rate = 0, plain = last = false, step = size;
        history.begin(tokens * width);
    }
};

template <class Phase>
static void substitute(const Shape &s, const Packed &p, const Cache &cache, const Solver &solver, const Phase &phase,
                       int samples, Outcome *outcome, int threads) {
    const int T = s.tokens, C = s.width, chunk = s.causal ? std::min(solver.chunk, T) : T;
    // evaluations far from the fixed point, where differences mislead but in a linear phase, that pass without memory, at most
    const int patience = phase.linear ? 0 : 2 + int(std::ceil(1 / solver.step));
    threads = std::max(1, std::min(threads, samples));
    const int together = std::max(1, std::min(ROWS / chunk, (samples + threads - 1) / threads));
    std::atomic<int> next{0};
    parallel(threads, [&] {
        // a unit that is not a whole sample hands on its slopes when it is settled
        Pass pass(s, p, cache, together * chunk, chunk < T ? std::max(QUERIES, chunk) : QUERIES);
        std::vector<Unit> units(together, Unit(chunk * C, solver.memory));
        std::vector<Pass::Row> rows;
        std::vector<int> first;
        auto take = [&](Unit &unit) {  // the next sample's first unit; false when there is none
            unit.sample = next++;
            if (unit.sample >= samples) return false;
            outcome[unit.sample] = {};
            unit.begin(phase.backwards ? (T - 1) / chunk * chunk : 0, phase.backwards ? T - (T - 1) / chunk * chunk : chunk, C,
                       solver.step);
            return true;
        };
        auto onward = [&](Unit &unit) {  // the sample's next unit, or the next sample
            const int at = unit.first + (phase.backwards ? -chunk : chunk);
            if (at < 0 || at >= T) return take(unit);
            unit.begin(at, std::min(chunk, T - at), C, solver.step);
            return true;
        };
        size_t busy = 0;
        while (busy < units.size() && take(units[busy])) busy++;
        units.erase(units.begin() + busy, units.end());
        while (!units.empty()) {
            rows.clear(), first.clear();
            for (auto &unit : units)
                for (int t = unit.first; t < unit.first + unit.rows; t++)
                    rows.push_back({unit.sample, t}), first.push_back(unit.first);
            phase.evaluate(pass, rows, first);
            int row = 0;
            for (size_t u = 0; u < units.size();) {
                Unit &unit = units[u];
                const int size = unit.rows * C, begin = row;
                float *z = phase.state + (size_t(unit.sample) * T + unit.first) * C;
                const float *push = &pass.push[size_t(begin) * C];
                Outcome &sum = outcome[unit.sample];
                row += unit.rows;
                sum.evaluations += unit.rows;
                const float residual = std::sqrt(dot(size, push, push)), norm = std::sqrt(dot(size, z, z));
                // what the sample's settled units left of their allowance goes to the next, up to twice its own
                const float own = phase.limit(pass, rows[begin], size, z, solver.tol), share = own * own;
                const float allowed = std::min(4 * share, sum.allowed + share - sum.squares);
                if (!unit.steps) unit.start = residual, unit.bound = GROWTH * std::max(norm, std::sqrt(float(size)));
                if (!unit.last) {
                    if (unit.previous > 0) unit.rate = residual / unit.previous;
                    unit.previous = residual;
                }
                bool alive = true;
                const bool broken = !std::isfinite(residual);
                if (broken || norm > unit.bound || residual > GROWTH * std::max(unit.start, norm)) {
                    sum.diverged = std::max(sum.diverged, broken ? 2 : 1);
                    sum.squares = INFINITY;
                    if (unit.lowest < INFINITY) std::copy_n(unit.best.begin(), size, z);
                    alive = take(unit);
                } else if (unit.last || residual * residual <= allowed
                           || (unit.steps == solver.max_steps && residual <= unit.lowest)) {
                    sum.squares += residual * residual, sum.allowed += share, sum.rate = std::max(sum.rate, unit.rate);
                    phase.settle(pass, rows, begin, row);
                    alive = onward(unit);
                } else {
                    const bool improved = residual < unit.lowest;
                    if (improved) {
                        unit.lowest = residual;
                        std::copy_n(z, size, unit.best.begin());
                    }
                    if (unit.steps == solver.max_steps) {  // out of steps: back to the best state, for its force and cache
                        unit.last = true;
                        std::copy_n(unit.best.begin(), size, z);
                    } else if (solver.memory && residual > STALL * unit.lowest) {  // plain from here on, at half the step
                        sum.fallbacks += !unit.plain;
                        unit.plain = true, unit.step /= 2;
                        unit.history.forget();
                        std::copy_n(unit.best.begin(), size, z);
                    } else {
                        if (residual > norm && unit.waits++ < patience) unit.history.forget();
                        if (solver.memory && !unit.plain) unit.history.record(z, push);
                        unit.history.move(z, push, unit.step);
                    }
                    unit.steps++;
                }
                // a unit without further samples leaves; the rows of those behind it are still in `pass`
                if (alive) u++;
                else units.erase(units.begin() + u);
            }
        }
    });
}

// work(pass, rows, at) for whole samples (samples, T, C), some of them together so that a product has rows enough; `repeat` of
// them share a cache, whose sample the row names, and at[i] is where row i begins. What the pass leaves in `push` goes to `to`.
template <class Work>
static void in_groups(const Shape &s, const float *packed, const Cache &cache, int samples, int repeat, float *to, int threads,
                      Work work) {
    const Packed p(s, packed);
    const int T = s.tokens, cached = samples / repeat;
    threads = std::max(1, std::min(threads, samples));
    const int together = std::max(1, std::min(ROWS / T, cached * repeat / threads));
    const int groups = (cached + together - 1) / together;
    std::atomic<int> next{0};
    parallel(threads, [&] {
        Pass pass(s, p, cache, together * T);
        std::vector<Pass::Row> rows;
        std::vector<size_t> at;
        for (int g; (g = next++) < groups * repeat;) {
            rows.clear(), at.clear();
            const int begin = g / repeat * together, copy = g % repeat;
            for (int b = begin; b < std::min(cached, begin + together); b++)
                for (int t = 0; t < T; t++)
                    rows.push_back({b, t}), at.push_back((size_t(b * repeat + copy) * T + t) * s.width);
            work(pass, rows, at);
            for (size_t i = 0; i < rows.size(); i++) std::copy_n(&pass.push[i * s.width], s.width, to + at[i]);
        }
    });
}

extern "C" {

long eplib_packed(int width, int hidden) {
    const int C = width, E = hidden;
    return long(C) * padded(3 * C + E) + long(C + E) * padded(C) + long(C) * padded(C + E) + long(3 * C + E) * padded(C)
           + padded(3 * C + E);
}

int eplib_padded(int tokens) { return padded(tokens); }

// Weights as torch.nn.Linear has them: qkv (3 C, C), wo (C, C), w1 (E, C), w2 (C, E); gain and bias of both LayerNorms (C).
void eplib_pack(int C, int E, const float *qkv, const float *wo, const float *w1, const float *w2, const float *gain1,
                const float *bias1, const float *gain2, const float *bias2, float *to) {
    to = pack(C, 3 * C + E, to, [&](int k, int c) {
        return c < 3 * C ? qkv[size_t(c) * C + k] * gain1[k] : w1[size_t(c - 3 * C) * C + k] * gain2[k]; });
    to = pack(C + E, C, to, [&](int k, int c) { return k < C ? wo[size_t(c) * C + k] : w2[size_t(c) * E + k - C]; });
    to = pack(C, C + E, to, [&](int k, int c) { return c < C ? wo[size_t(k) * C + c] : w2[size_t(k) * E + c - C]; });
    to = pack(3 * C + E, C, to, [&](int k, int c) {
        return k < 3 * C ? qkv[size_t(k) * C + c] * gain1[c] : w1[size_t(k - 3 * C) * C + c] * gain2[c]; });
    for (int c = 0; c < 3 * C; c++) *to++ = dot(C, qkv + size_t(c) * C, bias1);
    for (int c = 0; c < E; c++) *to++ = dot(C, w1 + size_t(c) * C, bias2);
}

// F of whole samples (samples, T, C), `repeat` of which share a clamp; each has a cache of its own.
void eplib_force(const Shape *s, const float *packed, const Cache *cache, int samples, int repeat, int linearise,
                 const float *z, const float *x, float *to, int threads) {
    in_groups(*s, packed, *cache, samples, 1, to, threads, [&](Pass &pass, const auto &rows, const auto &at) {
        pass.force(rows, [&](int i) { return z + at[i]; },
                   [&](int i) { return x + (size_t(rows[i].sample / repeat) * s->tokens + rows[i].token) * s->width; });
        if (linearise)
            for (auto row : rows) pass.linearise(row);
    });
}

// J v and J^T u of whole samples, `repeat` of which share a cache; own: J_tt v_t of each token. back (samples, T, 3 C + E) is
// zero on entry.
void eplib_product(const Shape *s, const float *packed, const Cache *cache, int samples, int repeat, int own, const float *v,
                   float *to, int threads) {
    in_groups(*s, packed, *cache, samples, repeat, to, threads, [&](Pass &pass, const auto &rows, const auto &at) {
        if (own) pass.product<true>(rows, [&](int i) { return v + at[i]; });
        else pass.product<false>(rows, [&](int i) { return v + at[i]; });
    });
}

// Every token's probe v (samples, T, C), refined by so many products v <- (I + step J_tt) v scaled to norm 1, and what one more
// makes of it, in `moved`. A few tokens at a time, so that what is kept of them stays in the fast caches from product to
// product.
void eplib_probe(const Shape *s, const float *packed, const Cache *cache, int samples, float step, int products, float *v,
                 float *moved, int threads) {
    const int C = s->width, all = samples * s->tokens, groups = (all + ROWS - 1) / ROWS;
    const Packed p(*s, packed);
    std::atomic<int> next{0};
    parallel(std::max(1, std::min(threads, groups)), [&] {
        Pass pass(*s, p, *cache, ROWS);
        std::vector<Pass::Row> rows;
        for (int g; (g = next++) < groups;) {
            rows.clear();
            for (int at = g * ROWS; at < std::min(all, (g + 1) * ROWS); at++) rows.push_back({at / s->tokens, at % s->tokens});
            float *from = v + size_t(g) * ROWS * C, *last = moved + size_t(g) * ROWS * C;
            for (int k = 0; k <= products; k++) {
                pass.product<true>(rows, [&](int i) { return from + size_t(i) * C; });
                float *to = k < products ? from : last;
                for (size_t i = 0; i < rows.size() * C; i++) to[i] = from[i] + step * pass.push[i];
                for (size_t i = 0; i < rows.size() && k < products; i++) {
                    float *one = to + i * C;
                    const float scale = 1 / std::max(std::sqrt(dot(C, one, one)), FLT_MIN);
                    for (int j = 0; j < C; j++) one[j] *= scale;
                }
            }
        }
    });
}

void eplib_transposed(const Shape *s, const float *packed, const Cache *cache, int samples, int repeat, const float *u,
                      float *back, float *to, int threads) {
    in_groups(*s, packed, *cache, samples, repeat, to, threads, [&](Pass &pass, const auto &rows, const auto &at) {
        pass.transposed(rows, [&](int i) { return u + at[i]; }, [&](int i) { return back + at[i] / s->width * pass.N; },
                        [](int) { return 0; });
    });
}

// to (A, padded B) = sum over k < count of a_k b_k^T, for a (count, A) and b (count, B): the read-out.
void eplib_outer(int count, int A, int B, const float *a, const float *b, float *to, int threads) {
    threads = std::max(1, std::min(threads, A / HELD));
    const int share = ((A + HELD - 1) / HELD + threads - 1) / threads * HELD;  // long pieces of the rows of a, read in order
    std::atomic<int> next{0};
    parallel(threads, [&] {
        for (int r; (r = share * next++) < A;) outer_products(count, A, B, a, b, r, std::min(A, r + share), to);
    });
}

// From the start states in z (samples, T, C) to the fixed points, with their linearisation in the cache and F there in rest.
void eplib_settle(const Shape *s, const float *packed, const Cache *cache, const Solver *solver, int samples, const float *x,
                  const float *scale, float *z, float *rest, Outcome *outcome, int threads) {
    substitute(*s, Packed(*s, packed), *cache, *solver, Free{x, scale, z, rest}, samples, outcome, threads);
}

// From the start in a (samples, T, C) to J^T a = -g; a unit's residual counts in units of scale (samples) shared out by its
// size. sent (samples, T, 2 C) is zero on entry.
void eplib_adjoint(const Shape *s, const float *packed, const Cache *cache, const Solver *solver, int samples, const float *g,
                   const float *scale, float *a, float *back, float *sent, Outcome *outcome, int threads) {
    substitute(*s, Packed(*s, packed), *cache, *solver, Adjoint{g, scale, a, back, sent}, samples, outcome, threads);
}
}
