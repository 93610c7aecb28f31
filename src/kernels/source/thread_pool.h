// The threads that kernels compute with.
#pragma once

#include <cstdint>
#include <functional>

namespace acnet {

// Calls fn(index) for each index below `count`, on all threads. What an index computes must not
// depend on the thread. If a call throws, the first exception is rethrown once all threads are
// done.
void parallel_for(int64_t count, const std::function<void(int64_t)> &fn);

// Number of threads; a kernel that is running keeps the pool that it began with.
int num_threads();
void set_num_threads(int threads);

// Whether the calling thread is already inside a parallel_for.
bool in_parallel();

}  // namespace acnet
