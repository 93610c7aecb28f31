#include "onednn.h"

#include <cstdlib>
#include <mutex>

#include <oneapi/dnnl/dnnl_threadpool.h>

#include "thread_pool.h"

// PoolInterface below reproduces the vtable of threadpool_iface, which is the same in 3.9 and 3.10
// except for wait(), the last method before the destructor, which 3.10 added.
static_assert(DNNL_VERSION_MAJOR == 3 && DNNL_VERSION_MINOR >= 9 && DNNL_VERSION_MINOR <= 10,
              "this version of oneDNN has not been tested");

namespace acnet {
namespace {

constexpr int kNewestMinor = 10;

// std::function of libstdc++, with which MindSpore's oneDNN was built. Spelled out, because a
// compiler with another standard library lays out its own std::function differently.
struct StdFunction {
    void *storage[2];
    void *manager;
    void (*invoke)(const StdFunction &, int &&, int &&);
};

// dnnl::threadpool_interop::threadpool_iface
class PoolInterface {
public:
    virtual int get_num_threads() const { return num_threads(); }
    virtual bool get_in_parallel() const { return in_parallel(); }
    virtual void parallel_for(int count, const StdFunction &fn) {
        acnet::parallel_for(count, [&](int64_t index) {
            fn.invoke(fn, static_cast<int>(index), static_cast<int>(count));
        });
    }
    virtual uint64_t get_flags() const { return 0; }
    virtual void wait() {}
    virtual ~PoolInterface() = default;
};

dnnl::stream &stream() {
    static PoolInterface *const pool = new PoolInterface;
    static thread_local dnnl::stream value = [] {
        dnnl_stream_t made = nullptr;
        dnnl::error::wrap_c_api(dnnl_threadpool_interop_stream_create(&made, cpu().get(), pool),
                                "cannot create a stream");
        return dnnl::stream(made);
    }();
    return value;
}

class Buffer {
public:
    ~Buffer() { std::free(data_); }
    void *of(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            size_t rounded = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, rounded);
            if (!data_) throw std::bad_alloc();
            size_ = rounded;
        }
        return data_;
    }

private:
    void *data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

void *scratch(Slot slot, size_t bytes) {
    static thread_local Buffer buffers[static_cast<int>(Slot::Count)];
    return buffers[static_cast<int>(slot)].of(bytes);
}

const dnnl::engine &cpu() {
    static const dnnl::engine *const value = new dnnl::engine(dnnl::engine::kind::cpu, 0);
    return *value;
}

dnnl::primitive_attr own_scratchpad() {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    return attributes;
}

dnnl::memory::desc blocked_md(int64_t n, int64_t c, int64_t h, int64_t w, int64_t block,
                              Type type) {
    using tag = dnnl::memory::format_tag;
    if (block != 1 && block != 8 && block != 16) {
        throw std::invalid_argument("no layout has blocks of " + std::to_string(block));
    }
    return {{n, c, h, w}, type, block == 16 ? tag::nChw16c : block == 8 ? tag::nChw8c : tag::nchw};
}

dnnl::memory::desc activation_md(const Activation &x) {
    return blocked_md(x.n, x.c, x.h, x.w, x.block, x.type);
}

dnnl::memory view(const dnnl::memory::desc &desc, const void *data) {
    return {desc, cpu(), const_cast<void *>(data)};
}

void execute(const dnnl::primitive &primitive, const dnnl::memory::desc &scratchpad_md,
             std::unordered_map<int, dnnl::memory> arguments) {
    void *memory = scratch(Slot::Primitive, scratchpad_md.get_size());
    arguments[DNNL_ARG_SCRATCHPAD] = view(scratchpad_md, memory);
    primitive.execute(stream(), arguments);
}

void reorder(const dnnl::memory::desc &from_md, const void *from, const dnnl::memory::desc &to_md,
             void *to) {
    dnnl::reorder::primitive_desc reorder_pd(cpu(), from_md, cpu(), to_md, own_scratchpad());
    execute(dnnl::reorder(reorder_pd), reorder_pd.scratchpad_desc(),
            {{DNNL_ARG_FROM, view(from_md, from)}, {DNNL_ARG_TO, view(to_md, to)}});
}

bool is_reference(const char *implementation) {
    std::string name(implementation);
    return name.find("ref") == 0 || name.find("simple") == 0 ||
           name.find("gemm:ref") != std::string::npos;
}

namespace {

void check_version() {
    const dnnl_version_t *version = dnnl_version();
    if (version->major != DNNL_VERSION_MAJOR || version->minor < DNNL_VERSION_MINOR ||
        version->minor > kNewestMinor) {
        throw std::runtime_error(
            "oneDNN is " + std::to_string(version->major) + "." + std::to_string(version->minor) +
            ", the kernels are for " + std::to_string(DNNL_VERSION_MAJOR) + "." +
            std::to_string(DNNL_VERSION_MINOR) + " to 3." + std::to_string(kNewestMinor));
    }
}

std::mutex &configuration_mutex() {
    static std::mutex *const value = new std::mutex;
    return *value;
}

}  // namespace
}  // namespace acnet

// The processor's instructions that oneDNN uses, as a dnnl_cpu_isa_t.
extern "C" int acnet_isa() { return static_cast<int>(dnnl::get_effective_cpu_isa()); }

// Sets the number of threads and which of the processor's instructions to use, as a dnnl_cpu_isa_t,
// 0 for all. The instructions cannot change later. Returns 0, or 1 with acnet_last_error.
extern "C" int acnet_configure(int threads, int isa) {
    return acnet::guarded("", "configure", [&] {
        static int configured = -1;
        std::lock_guard<std::mutex> lock(acnet::configuration_mutex());
        acnet::check_version();
        if (configured < 0) {
            if (dnnl::set_max_cpu_isa(static_cast<dnnl::cpu_isa>(isa)) != dnnl::status::success) {
                throw std::runtime_error("oneDNN was used before it was configured");
            }
            configured = isa;
        } else if (isa != configured && isa != acnet_isa()) {
            throw std::runtime_error("the instructions to use cannot change in a process");
        }
        acnet::set_num_threads(threads);
    });
}
