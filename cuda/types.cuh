// Integer names and the two element types. No headers: NVRTC compiles these sources as they are.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// Tags for the 16-bit storage types; data itself travels as u16 / packed u32.
struct Bf16 {};
struct Fp16 {};

template <typename A, typename B>
constexpr bool kIsSame = false;
template <typename A>
constexpr bool kIsSame<A, A> = true;

constexpr float kLn2 = 0.693147180559945309f;

constexpr u32 kWarpThreads = 32;
constexpr u32 kWarpgroupThreads = 128;

// IEEE infinity as a float32 value; the sources include no <math.h>.
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
