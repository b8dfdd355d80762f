// The three passes over one sample of the factor transfer loss; compiled once for each instruction set.
//   a = s * si, b = t * ti;   p=1: l = sum |a - b|, g = sign(a - b);   p=2: l = |a - b|, g = (a - b) / l
//   ds = c * (g - a <g, a>)
// All in units of the student's norm: d = s - t * r with r = ti / si is (a - b) / si, one operation instead of three, and
// exactly 0 where s equals t. The first pass reads memory; the others find the sample in cache. (Touching the next
// sample ahead was measured slower.)

#include <type_traits>

#include "ft_loss.h"
#include "vector.h"

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

constexpr int unroll = 4;             // independent sums, so that additions overlap
constexpr int64_t prefetch_ahead = 512;  // elements; the processor's own prefetching stops at page boundaries
// Additions to one lane before it is folded into double: a longer run of equal numbers is rounded the same way each
// time, and at 2^24 elements that is seen in the fifth digit.
constexpr int64_t fold_steps = 64;

template <class C>
constexpr int lanes = vector_bytes / int(sizeof(C));

// Calls body(s, t, first element, valid count) for whole registers, and once for a zero-padded tail.
template <class C, class S, class T, class Body>
inline void for_tail(const S* s, const T* t, int64_t begin, int64_t size, Body body) {
  int64_t i = begin;
  for (; i + lanes<C> <= size; i += lanes<C>) body(s + i, t + i, i, lanes<C>);
  if (i == size) return;
  S padded_s[lanes<C>] = {};
  T padded_t[lanes<C>] = {};
  std::memcpy(padded_s, s + i, sizeof(S) * (size - i));
  std::memcpy(padded_t, t + i, sizeof(T) * (size - i));
  body(padded_s, padded_t, i, int(size - i));
}

template <class C, class S, class T>
struct Row {
  using Values = typename Register<C>::Values;
  using Bits = typename Register<C>::Bits;
  static constexpr int64_t step = unroll * lanes<C>;

  // Two sums over a row: a run of whole steps in registers of C, then folded into double.
  struct Sums {
    Values first[unroll] = {}, second[unroll] = {};
    DoubleSum<C> first_total, second_total;

    void fold() {
      first_total.add((first[0] + first[1]) + (first[2] + first[3]));
      second_total.add((second[0] + second[1]) + (second[2] + second[3]));
      for (int u = 0; u < unroll; ++u) first[u] = second[u] = Values{};
    }

    void put(double* sums) {
      fold();
      sums[0] = first_total.sum();
      sums[1] = second_total.sum();
    }
  };

  // Calls each(i) for whole steps, with a fold of all sums after so many of them; returns where the tail begins.
  template <class Each, class... AllSums>
  static int64_t for_steps(int64_t size, Each each, AllSums&... sums) {
    const int64_t stop = size / step * step;
    for (int64_t i = 0; i < stop;) {
      const int64_t end = stop - i > fold_steps * step ? i + fold_steps * step : stop;
      for (; i < end; i += step) each(i);
      if (i < stop) (sums.fold(), ...);
    }
    return stop;
  }

  static void add_squares(Sums& sums, const S* s, const T* t, int u) {
    const Values x = load(s), y = load(t);
    sums.first[u] = multiply_add(x, x, sums.first[u]);
    sums.second[u] = multiply_add(y, y, sums.second[u]);
  }

  static void squares(const void* student, const void* teacher, int64_t size, double* result) {
    const S* s = static_cast<const S*>(student);
    const T* t = static_cast<const T*>(teacher);
    Sums sums;
    const auto add_step = [&](int64_t i) {
      for (int u = 0; u < unroll; ++u) add_squares(sums, s + i + u * lanes<C>, t + i + u * lanes<C>, u);
    };
    const int64_t stop = for_steps(size, add_step, sums);
    finish_squares(s, t, stop, size, sums, result);
  }

  static void finish_squares(const S* s, const T* t, int64_t from, int64_t size, Sums& sums, double* result) {
    for_tail<C>(s, t, from, size, [&](const S* s_tail, const T* t_tail, int64_t, int) {
      add_squares(sums, s_tail, t_tail, 0);
    });
    sums.put(result);
  }

  template <int P>
  static void distances_of(const S* s, const T* t, int64_t size, C r, double* result, const S* next_s, const T* next_t,
                           double* next_result) {
    const Values ratio = Values{} + r;
    Sums sums, next_sums;
    const auto add = [&](const S* s_at, const T* t_at, int u) {
      const Values x = load(s_at), d = subtract_product(x, load(t_at), ratio);
      Values &l = sums.first[u], &product = sums.second[u];
      l = P == 1 ? l + absolute<C>(d) : multiply_add(d, d, l);
      product = P == 1 ? add_signed<C>(product, d, x) : multiply_add(d, x, product);
    };
    const auto add_step = [&](int64_t i) {
      for (int u = 0; u < unroll; ++u) add(s + i + u * lanes<C>, t + i + u * lanes<C>, u);
    };
    int64_t stop = 0;
    if (next_s) {
      stop = for_steps(
          size,
          [&](int64_t i) {
            add_step(i);
            for (int u = 0; u < unroll; ++u)
              add_squares(next_sums, next_s + i + u * lanes<C>, next_t + i + u * lanes<C>, u);
          },
          sums, next_sums);
      finish_squares(next_s, next_t, stop, size, next_sums, next_result);
    } else {
      stop = for_steps(size, add_step, sums);
    }
    for_tail<C>(s, t, stop, size, [&](const S* s_tail, const T* t_tail, int64_t, int) { add(s_tail, t_tail, 0); });
    sums.put(result);
  }

  static void distances(const void* s, const void* t, int64_t size, int p, double r, double* sums, const void* next_s,
                        const void* next_t, double* next_sums) {
    const auto of = p == 1 ? distances_of<1> : distances_of<2>;
    of(static_cast<const S*>(s), static_cast<const T*>(t), size, C(r), sums, static_cast<const S*>(next_s),
       static_cast<const T*>(next_t), next_sums);
  }

  // Loads go ahead of the stores: a store holds up the loads after it that look like its own address in the low bits.
  template <int P, bool streaming>
  static void gradient_and_next_squares_of(const S* s, const T* t, S* out, int64_t size, C r, C h, C k, C c,
                                           const S* next_s, const T* next_t, double* next_sums) {
    const Values ratio = Values{} + r, along_d = Values{} + h, along_s = Values{} + k, whole = Values{} + c;
    Values results[unroll];
    Sums sums;
    const auto each = [&](int64_t i) {
      for (int u = 0; u < unroll; ++u) {
        const int64_t at = i + u * lanes<C>;
        if (streaming) {
          __builtin_prefetch(next_s + at + prefetch_ahead);
          __builtin_prefetch(next_t + at + prefetch_ahead);
        }
        const Values x = load(s + at), d = subtract_product(x, load(t + at), ratio);
        const Values g = P == 1 ? signed_by<C>(d, along_d) : d * along_d;
        results[u] = subtract_product(g, x, along_s) * whole;
        add_squares(sums, next_s + at, next_t + at, u);
      }
      for (int u = 0; u < unroll; ++u) put<streaming>(out + i + u * lanes<C>, results[u]);
    };
    const int64_t stop = for_steps(size, each, sums);
    if (streaming) fence_streams();
    gradient_of<false, P, false, S>(s + stop, t + stop, out + stop, size - stop, r, h, k, c);
    finish_squares(next_s, next_t, stop, size, sums, next_sums);
  }

  static void gradient_and_next_squares(const void* s, const void* t, void* out, int64_t size, int p, double r,
                                        double h, double k, double c, const void* next_s, const void* next_t,
                                        double* next_sums, bool past_caches) {
    S* to = static_cast<S*>(out);
    auto of = p == 1 ? gradient_and_next_squares_of<1, false> : gradient_and_next_squares_of<2, false>;
    if (past_caches && streams_to(to))
      of = p == 1 ? gradient_and_next_squares_of<1, true> : gradient_and_next_squares_of<2, true>;
    of(static_cast<const S*>(s), static_cast<const T*>(t), to, size, C(r), C(h), C(k), C(c),
       static_cast<const S*>(next_s), static_cast<const T*>(next_t), next_sums);
  }

  template <bool of_teacher, int P, bool streaming, class X>
  static void gradient_of(const S* s, const T* t, X* out, int64_t size, C r, C h, C k, C c) {
    const Values ratio = Values{} + r, along_d = Values{} + h, along_x = Values{} + k, whole = Values{} + c;
    const auto at = [&](const S* s_at, const T* t_at) {
      const Values x = load(s_at), y = load(t_at), d = subtract_product(x, y, ratio);
      const Values g = P == 1 ? signed_by<C>(d, along_d) : d * along_d;
      return subtract_product(g, of_teacher ? y : x, along_x) * whole;
    };
    int64_t i = 0;
    Values results[unroll];
    for (; i + step <= size; i += step) {
      for (int u = 0; u < unroll; ++u) results[u] = at(s + i + u * lanes<C>, t + i + u * lanes<C>);
      for (int u = 0; u < unroll; ++u) put<streaming>(out + i + u * lanes<C>, results[u]);
    }
    if (streaming) fence_streams();
    for_tail<C>(s, t, i, size, [&](const S* s_tail, const T* t_tail, int64_t first, int valid) {
      X result[lanes<C>];
      store(result, at(s_tail, t_tail));
      std::memcpy(out + first, result, sizeof(X) * valid);
    });
  }

  template <bool of_teacher, class X>
  static void gradient(const void* s, const void* t, void* out, int64_t size, int p, double r, double h, double k,
                       double c, bool past_caches) {
    X* to = static_cast<X*>(out);
    auto of = p == 1 ? gradient_of<of_teacher, 1, false, X> : gradient_of<of_teacher, 2, false, X>;
    if (past_caches && streams_to(to))
      of = p == 1 ? gradient_of<of_teacher, 1, true, X> : gradient_of<of_teacher, 2, true, X>;
    of(static_cast<const S*>(s), static_cast<const T*>(t), to, size, C(r), C(h), C(k), C(c));
  }

  static RowKernels kernels() {
    RowKernels all = {squares, distances, gradient<false, S>, gradient_and_next_squares, nullptr};
    if constexpr (!std::is_same<T, int8_t>::value) all.teacher_gradient = gradient<true, T>;
    return all;
  }
};

template <class S>
RowKernels of_teacher(DType teacher) {
  switch (teacher) {
    case DType::float32: return Row<float, S, float>::kernels();
    case DType::bfloat16: return Row<float, S, BFloat16>::kernels();
    case DType::float16: return Row<float, S, Float16>::kernels();
    case DType::int8: return Row<float, S, int8_t>::kernels();
    case DType::float64: case DType::float8_e4m3fn: break;  // the driver converts them first
  }
  return {};
}

}  // namespace

RowKernels row_kernels(DType student, DType teacher) {
  switch (student) {
    case DType::float64: return teacher == DType::float64 ? Row<double, double, double>::kernels() : RowKernels{};
    case DType::float32: return of_teacher<float>(teacher);
    case DType::bfloat16: return of_teacher<BFloat16>(teacher);
    case DType::float16: return of_teacher<Float16>(teacher);
    case DType::int8: case DType::float8_e4m3fn: break;  // no student's
  }
  return {};
}

}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
