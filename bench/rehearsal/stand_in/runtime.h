// A stand-in for the CUDA runtime, cuBLAS and the CUDA driver beneath a CUDA build of PyTorch, without a GPU.
//
// What holds: every stream, event, capture, graph and block of memory is kept, and what CUDA refuses is refused with
// its error (calls that a capture forbids, in its mode and by thread; work on the default stream beside a capture that
// it would join; waits across a capture's edge; forks that never join; grids, blocks and shared memory that no launch
// can have; what was freed or never made; copies beyond their memory). Each refusal but for want of memory is written
// down, and so is how often the device was given work, waited for and asked for memory.
//
// What does not: kernels, products, fills and copies do nothing and take no time. Memory of the device holds nothing:
// addresses are reserved, and a host that reads or writes there ends with a fault. What comes to the host from there is
// rubbish, the same each time, of which every number is finite and every flag set.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace rehearsal {

// The device is that of an H200, but for its speed.
constexpr int kMajor = 9, kMinor = 0, kMultiprocessors = 132, kWarp = 32;
constexpr int kThreadsOfBlock = 1024, kThreadsOfMultiprocessor = 2048, kRegisters = 65536;
constexpr int kSharedBytes = 48 << 10, kMostSharedBytes = 227 << 10, kSharedBytesOfMultiprocessor = 228 << 10;
constexpr int kCacheBytes = 60 << 20;
constexpr int64_t kMemoryBytes = int64_t{140} << 30;
constexpr int kVersion = 13000;

// What is counted. Work that is captured counts as such, and not by what it is.
enum Count {
    kLaunches,
    kGraphLaunches,
    kCopies,
    kFills,
    kCaptured,
    kOnDefaultStream,  // beside what it is
    kWaits,
    kDeviceAllocations,
    kDeviceFrees,
    kHostAllocations,
    kGraphs,
    kIllegal,
    kCounts
};

struct Stream;

// How much work of each stream of a capture comes before something.
using Before = std::map<const Stream*, int64_t>;

struct Capture {
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    Stream* origin;
    std::set<Stream*> streams;
    unsigned long long id;
    int64_t nodes = 0;
    bool spoilt = false;
};

struct Stream {
    bool blocking;  // waits for the default stream, and makes it wait
    int priority;
    Capture* capture = nullptr;
    Before before = {};  // the next work, while it is capturing
    int64_t work = 0;    // since counts were last set to zero
};

struct Event {
    bool timed;
    bool recorded = false;
    std::chrono::steady_clock::time_point moment = {};
    unsigned long long capture = 0;  // that it was recorded in; 0: none
    Before before = {};
};

struct Block {
    size_t bytes;
    bool on_device;
};

// All that there is. Never destroyed: libraries give things back when the process ends.
struct State {
    std::recursive_mutex mutex;
    Stream default_stream{true, 0}, thread_stream{true, 0};
    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<int64_t*> graphs, executables;  // by their number of nodes
    std::map<unsigned long long, Capture*> captures;
    unsigned long long last_capture = 0;
    std::map<uintptr_t, Block> blocks;
    int64_t bytes_on_device = 0;
    std::unordered_map<const void*, std::string> kernels;  // by the address of their function on the host
    std::unordered_map<const void*, size_t> shared_bytes;  // that they have asked for, beyond kSharedBytes
    int64_t counts[kCounts] = {};
    std::vector<std::string> examples[kCounts];
};

State& state();

// Held by whatever reads the state or changes it.
struct Lock {
    std::lock_guard<std::recursive_mutex> held{state().mutex};
};

void count(Count which, const char* what);

// What this thread is told next, by cudaGetLastError.
cudaError_t failed(cudaError_t code);

// A failure that means that the caller is wrong.
cudaError_t illegal(cudaError_t code, const std::string& what);

// nullptr, and written down as illegal: there is no such stream.
Stream* find(cudaStream_t handle, const char* caller);

// Takes work for a stream. `now`: it is to be done at once, and not when a graph is launched.
cudaError_t take(cudaStream_t handle, Count kind, const char* what, bool& now);
cudaError_t take(cudaStream_t handle, Count kind, const char* what);

cudaError_t take_launch(cudaStream_t stream, const char* kernel, dim3 grid, dim3 block, size_t shared_bytes);

// Whether a call that could wait or synchronise may be made now; it spoils captures that it may not be made beside.
cudaError_t allowed_while_capturing(const char* caller);

cudaError_t spoil(Capture& capture, cudaError_t code, const std::string& what);

}  // namespace rehearsal
