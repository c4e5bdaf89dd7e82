// Pictures cut into patches on NVIDIA GPUs from sm_80 on: rows of channels x side x side numbers for a matrix product,
// converted on the way.
//
// Plan. A thread writes 8 neighbouring numbers of a row, one piece of a line of the picture; what lies beyond the picture
// is zero. The picture is read once where patches do not overlap, the rows are written once: 2 or 4 bytes of each a number.
// No time measured.

constexpr int THREADS = 256, PIECE = 8;

struct Patches {
  const char *images;
  char *rows;
  i64 image, channel;  // strides in bytes
  int line;
  int batch, channels, height, width, side, stride, columns, length;  // length: patches of a picture
  int aligned;                                                        // every whole piece may be read at once
};

template <class T>
struct alignas(4 * T::PAIR_BYTES) Piece {
  typename T::Pair v[PIECE / 2];
};
template <class S>
__device__ __forceinline__ float read(const char *line, int x) {
  if constexpr (S::EXACT)
    return ((const float *)line)[x];
  else
    return S::first(((const unsigned short *)line)[x]);
}

template <class S, class T>
__device__ __forceinline__ void cut_patches(const Patches &p) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const int pieces_of_line = p.side / PIECE, pieces_of_patch = p.side * pieces_of_line;
  const int pieces = p.channels * pieces_of_patch;
  const i64 at = (i64)blockIdx.x * THREADS + threadIdx.x, row = at / pieces;
  const int batch = (int)(row / p.length), patch = (int)(row - (i64)batch * p.length);
  if (batch >= p.batch) return;
  const int piece = (int)(at - row * pieces), channel = piece / pieces_of_patch, within = piece - channel * pieces_of_patch;
  const int down = patch / p.columns, across = patch - down * p.columns;
  const int y = down * p.stride + within / pieces_of_line, x = across * p.stride + within % pieces_of_line * PIECE;
  const char *const line = p.images + batch * p.image + channel * p.channel + (i64)y * p.line;
  float v[PIECE];
  if (p.aligned && y < p.height && x + PIECE <= p.width) {
    const Piece<S> piece_of_line = ((const Piece<S> *)line)[x / PIECE];
#pragma unroll
    for (int i = 0; i < PIECE / 2; i++)
      v[2 * i] = S::first(piece_of_line.v[i]), v[2 * i + 1] = S::second(piece_of_line.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < PIECE; i++) v[i] = y < p.height && x + i < p.width ? read<S>(line, x + i) : 0.f;
  }
  Piece<T> out;
#pragma unroll
  for (int i = 0; i < PIECE / 2; i++) out.v[i] = T::pack(v[2 * i], v[2 * i + 1]);
  ((Piece<T> *)p.rows)[at] = out;
}

#define KERNEL(NAME, S, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS) patches_kernel_##NAME(const __grid_constant__ Patches p) {    \
    cut_patches<S, T>(p);                                                                                             \
  }
KERNEL(float32_float32, Fp32, Fp32)
KERNEL(float32_bfloat16, Fp32, Bf16)
KERNEL(float32_float16, Fp32, Fp16)
KERNEL(bfloat16_bfloat16, Bf16, Bf16)
KERNEL(float16_float16, Fp16, Fp16)
