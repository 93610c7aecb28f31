// oneDNN on this program's threads and memory.
#pragma once

#include <unordered_map>

#include "arguments.h"

namespace acnet {

// Memory of the calling thread. It stays until the thread ends; the next request for the same slot
// overwrites it.
enum class Slot { Primitive, Weights, Layout, OtherLayout, Gradient, Sum, Count };
void *scratch(Slot slot, size_t bytes);

const dnnl::engine &cpu();
// Attributes of a primitive whose scratch memory is ours.
dnnl::primitive_attr own_scratchpad();
// Throws for a block other than 1, 8 and 16.
dnnl::memory::desc blocked_md(int64_t n, int64_t c, int64_t h, int64_t w, int64_t block, Type type);
dnnl::memory::desc activation_md(const Activation &x);
dnnl::memory view(const dnnl::memory::desc &desc, const void *data);
void execute(const dnnl::primitive &primitive, const dnnl::memory::desc &scratchpad_md,
             std::unordered_map<int, dnnl::memory> arguments);
void reorder(const dnnl::memory::desc &from_md, const void *from, const dnnl::memory::desc &to_md,
             void *to);
bool is_reference(const char *implementation);

}  // namespace acnet
