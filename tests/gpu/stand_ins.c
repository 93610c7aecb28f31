/* The calls that a stub which returns 0 cannot answer: memory, copies, descriptors that are asked
 * for sizes, handles, versions.
 *
 * One source for all libraries; generate.py compiles it once for each with -DIN_<tag of its
 * SONAME>. What is not here becomes a counting stub. Signatures are those of NVIDIA's public
 * documentation. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Counters and what the environment says of the machine: in libnull_gpu.so, to which the others
 * link. */
enum kind {
    ALLOCATION,
    HOST_ALLOCATION,
    COPY_H2H,
    COPY_H2D,
    COPY_D2H,
    COPY_D2D,
    COPY_DEFAULT, /* these and the next in the order of cudaMemcpyKind */
    ASYNC_H2H,
    ASYNC_H2D,
    ASYNC_D2H,
    ASYNC_D2D,
    ASYNC_DEFAULT,
    MEMSET,
    STREAM_SYNC,
    DEVICE_SYNC,
    EVENT_SYNC,
    ALL_REDUCE,
    BROADCAST,
    COMMUNICATOR,
    KINDS
};
struct counter {
    const char *name;
    unsigned long long calls, bytes;
};
void null_gpu_count(enum kind kind, size_t bytes);
int null_gpu_devices(void); /* GPUs that this process sees */
void null_gpu_capability(int *major, int *minor);
size_t null_gpu_memory(void); /* bytes of one GPU */
int null_gpu_finite(void);    /* what a kernel says that asks whether numbers are finite */
void null_gpu_know(const void *start,
                   size_t bytes); /* these bytes hold what the host put there, or an answer */
int null_gpu_knows(const void *start, size_t bytes);

#define HANDLE(function)          \
    int function(void **handle) { \
        *handle = calloc(1, 8);   \
        return 0;                 \
    }
#define TEXT(function) \
    const char *function(int status) { return "an error of the null GPU"; }

#ifdef IN_libnull_gpu_so
int null_gpu_kinds = KINDS;
struct counter null_gpu_counters[KINDS] = {
    {"allocation"},     {"host allocation"}, {"copy H2H"},       {"copy H2D"},
    {"copy D2H"},       {"copy D2D"},        {"copy default"},   {"async copy H2H"},
    {"async copy H2D"}, {"async copy D2H"},  {"async copy D2D"}, {"async copy default"},
    {"memset"},         {"stream sync"},     {"device sync"},    {"event sync"},
    {"AllReduce"},      {"Broadcast"},       {"communicator"},
};
void null_gpu_count(enum kind kind, size_t bytes) {
    __atomic_fetch_add(&null_gpu_counters[kind].calls, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&null_gpu_counters[kind].bytes, bytes, __ATOMIC_RELAXED);
}
static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}
int null_gpu_devices(void) {
    int present = atoi(setting("NULL_GPU_COUNT", "8")), listed = 1;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return present;
    if (!*visible) return 0;
    for (; *visible; visible++) listed += *visible == ',';
    return listed < present ? listed : present;
}
void null_gpu_capability(int *major, int *minor) {
    const char *told = setting("NULL_GPU_CAPABILITY", "8.0"), *point = strchr(told, '.');
    *major = atoi(told);
    *minor = point ? atoi(point + 1) : 0;
}
size_t null_gpu_memory(void) { return (size_t)atoi(setting("NULL_GPU_MEMORY_GB", "80")) << 30; }
int null_gpu_finite(void) { return atoi(setting("NULL_GPU_FINITE", "1")); }

/* Where copies from the host went, by address. An address that MindSpore uses again for something
 * of another size is not known. */
static struct place {
    const void *start;
    size_t bytes;
} places[1 << 20];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct place *find(const void *start) {
    size_t i = ((uintptr_t)start >> 9) % (1 << 20);
    while (places[i].start && places[i].start != start) i = (i + 1) % (1 << 20);
    return &places[i];
}
void null_gpu_know(const void *start, size_t bytes) {
    pthread_mutex_lock(&lock);
    *find(start) = (struct place){start, bytes};
    pthread_mutex_unlock(&lock);
}
int null_gpu_knows(const void *start, size_t bytes) {
    pthread_mutex_lock(&lock);
    int known = find(start)->bytes == bytes;
    pthread_mutex_unlock(&lock);
    return known;
}
#endif

#ifdef IN_libcuda_so_1
int cuInit(unsigned flags) { return null_gpu_devices() ? 0 : 100; /* CUDA_ERROR_NO_DEVICE */ }
int cuDeviceGetCount(int *count) {
    *count = null_gpu_devices();
    return 0;
}
int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cuGetErrorName(int status, const char **name) {
    *name = "an error of the null GPU";
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = null_gpu_memory();
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int major, minor;
    null_gpu_capability(&major, &minor);
    *value = attribute == 75 ? major : attribute == 76 ? minor : 1024;
    return 0;
}
#endif

#ifdef IN_libcudart_so_11_0
struct properties { /* the first fields of cudaDeviceProp in CUDA 11 */
    char name[256], uuid[16], luid[8];
    unsigned node_mask;
    size_t memory, shared_memory;
    int registers, warp;
    size_t pitch;
    int block_threads, block[3], grid[3], clock;
    size_t constants;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    int overlap, processors;
};
/* Addresses only, until something is copied to them. */
static int take(void **start, size_t bytes, enum kind kind) {
    null_gpu_count(kind, bytes);
    *start = mmap(0, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *start == MAP_FAILED ? 2 : 0; /* cudaErrorMemoryAllocation */
}
int cudaGetDeviceCount(int *count) {
    *count = null_gpu_devices();
    return *count ? 0 : 100;
}
int cudaGetDeviceProperties(struct properties *p, int device) {
    *p = (struct properties){.name = "null GPU",
                             .memory = null_gpu_memory(),
                             .shared_memory = 49152,
                             .registers = 65536,
                             .warp = 32,
                             .block_threads = 1024,
                             .block = {1024, 1024, 64},
                             .grid = {0x7fffffff, 65535, 65535},
                             .processors = 108};
    null_gpu_capability(&p->major, &p->minor);
    return 0;
}
int cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = null_gpu_memory();
    *unused = *total - (1ull << 30);
    return 0;
}
int cudaMalloc(void **start, size_t bytes) { return take(start, bytes, ALLOCATION); }
int cudaHostAlloc(void **start, size_t bytes, unsigned flags) {
    return take(start, bytes, HOST_ALLOCATION);
}
/* What the host put on the GPU comes back from there. What kernels computed is zero to the host, as
 * are all scalars, and no copy on the GPU moves anything: weights stay as they were, and no remains
 * of other tensors pass for a loss or logits. */
static int copy(void *to, const void *from, size_t bytes, int direction) {
    if (direction < 2 ||
        (direction == 2 && (bytes > 4 || bytes == 1) && null_gpu_knows(from, bytes)))
        memmove(to, from, bytes);
    else if (direction == 2) memset(to, 0, bytes);
    if (direction == 1) null_gpu_know(to, bytes);
    return 0;
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int direction) {
    null_gpu_count(COPY_H2H + direction, bytes);
    return copy(to, from, bytes, direction);
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int direction, void *stream) {
    null_gpu_count(ASYNC_H2H + direction, bytes);
    return copy(to, from, bytes, direction);
}
int cudaMemset(void *start, int value, size_t bytes) {
    null_gpu_count(MEMSET, bytes);
    memset(start, value, bytes);
    return 0;
}
int cudaMemsetAsync(void *start, int value, size_t bytes, void *stream) {
    return cudaMemset(start, value, bytes);
}
int cudaStreamSynchronize(void *stream) {
    null_gpu_count(STREAM_SYNC, 0);
    return 0;
}
int cudaDeviceSynchronize(void) {
    null_gpu_count(DEVICE_SYNC, 0);
    return 0;
}
int cudaEventSynchronize(void *event) {
    null_gpu_count(EVENT_SYNC, 0);
    return 0;
}
int cudaEventElapsedTime(float *ms, void *from, void *to) {
    *ms = 0;
    return 0;
}
HANDLE(cudaStreamCreate);
HANDLE(cudaStreamCreateWithFlags);
HANDLE(cudaStreamCreateWithPriority);
HANDLE(cudaEventCreate);
HANDLE(cudaEventCreateWithFlags);
TEXT(cudaGetErrorName);
TEXT(cudaGetErrorString);
#endif

#ifdef IN_libcublas_so_11
HANDLE(cublasCreate_v2);
int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}
#endif

#ifdef IN_libcusolver_so_11
HANDLE(cusolverDnCreate);
#endif
#ifdef IN_libcusparse_so_11
HANDLE(cusparseCreate);
#endif
#ifdef IN_libcurand_so_10
HANDLE(curandCreateGenerator);
#endif
#ifdef IN_libnvrtc_so_11_2
int nvrtcVersion(int *major, int *minor) {
    *major = 11;
    *minor = 6;
    return 0;
}
#endif
#ifdef IN_libcudnn_so_8
/* Descriptors of tensors and filters hold their size in bytes, which is all that they are asked
 * for. */
struct found {
    int algorithm, status;
    float ms;
    size_t workspace;
    int deterministic, math, reserved[3];
};
static size_t width(int type) {
    static const size_t bytes[] = {4, 8, 2,  1, 4, 4,
                                   1, 4, 32, 2, 8}; /* in the order of cudnnDataType_t */
    return type >= 0 && type < (int)(sizeof bytes / sizeof *bytes) ? bytes[type] : 4;
}
static int set(size_t *size, int type, int rank, const int *shape) {
    *size = width(type);
    for (int i = 0; i < rank; i++) *size *= shape[i];
    return 0;
}
int cudnnSetTensor4dDescriptor(size_t *t, int layout, int type, int n, int c, int h, int w) {
    return set(t, type, 4, (int[]){n, c, h, w});
}
int cudnnSetFilter4dDescriptor(size_t *f, int type, int layout, int k, int c, int h, int w) {
    return set(f, type, 4, (int[]){k, c, h, w});
}
int cudnnSetTensorNdDescriptor(size_t *t, int type, int rank, int *shape, int *strides) {
    return set(t, type, rank, shape);
}
int cudnnSetTensorNdDescriptorEx(size_t *t, int layout, int type, int rank, int *shape) {
    return set(t, type, rank, shape);
}
int cudnnSetFilterNdDescriptor(size_t *f, int type, int layout, int rank, int *shape) {
    return set(f, type, rank, shape);
}
int cudnnGetTensorSizeInBytes(size_t *t, size_t *bytes) {
    *bytes = *t;
    return 0;
}
int cudnnGetFilterSizeInBytes(size_t *f, size_t *bytes) {
    *bytes = *f;
    return 0;
}
HANDLE(cudnnCreate);
HANDLE(cudnnCreateActivationDescriptor);
HANDLE(cudnnCreateConvolutionDescriptor);
HANDLE(cudnnCreateDropoutDescriptor);
HANDLE(cudnnCreateFilterDescriptor);
HANDLE(cudnnCreateLRNDescriptor);
HANDLE(cudnnCreateOpTensorDescriptor);
HANDLE(cudnnCreatePoolingDescriptor);
HANDLE(cudnnCreateRNNDescriptor);
HANDLE(cudnnCreateReduceTensorDescriptor);
HANDLE(cudnnCreateTensorDescriptor);
TEXT(cudnnGetErrorString);
/* Sizes that are invented here: 1 MiB for each convolution, nothing for the rest. */
#define P void *
#define SIZE(function, size, ...)              \
    int function(__VA_ARGS__, size_t *bytes) { \
        *bytes = size;                         \
        return 0;                              \
    }
SIZE(cudnnDropoutGetStatesSize, 1024, P handle);
SIZE(cudnnGetReductionIndicesSize, 0, P handle, P reduction, P from, P to);
SIZE(cudnnGetReductionWorkspaceSize, 0, P handle, P reduction, P from, P to);
SIZE(cudnnGetConvolutionForwardWorkspaceSize, 1 << 20, P handle, P x, P w, P convolution, P y,
     int algorithm);
SIZE(cudnnGetConvolutionBackwardDataWorkspaceSize, 1 << 20, P handle, P w, P dy, P convolution,
     P dx, int algorithm);
SIZE(cudnnGetConvolutionBackwardFilterWorkspaceSize, 1 << 20, P handle, P x, P dy, P convolution,
     P dw, int algorithm);
SIZE(cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize, 0, P handle, int mode, int ops, P x,
     P z, P y, P scale, P activation);
SIZE(cudnnGetBatchNormalizationBackwardExWorkspaceSize, 0, P handle, int mode, int ops, P x, P y,
     P dy, P dz, P dx, P scale, P activation);
SIZE(cudnnGetBatchNormalizationTrainingExReserveSpaceSize, 0, P handle, int mode, int ops,
     P activation, P x);
#define ALGORITHM(function)                                                                    \
    int function(P handle, P a, P b, P c, P d, int asked, int *returned, struct found *best) { \
        *returned = 1;                                                                         \
        *best = (struct found){.algorithm = 1, .math = 1};                                     \
        return 0;                                                                              \
    }
ALGORITHM(cudnnGetConvolutionForwardAlgorithm_v7);
ALGORITHM(cudnnFindConvolutionForwardAlgorithm);
ALGORITHM(cudnnGetConvolutionBackwardDataAlgorithm_v7);
ALGORITHM(cudnnFindConvolutionBackwardDataAlgorithm);
ALGORITHM(cudnnGetConvolutionBackwardFilterAlgorithm_v7);
ALGORITHM(cudnnFindConvolutionBackwardFilterAlgorithm);
#endif

#ifdef IN_libcuda_ops_so_11
/* generate.py points three kernels here: whether numbers are finite, whether booleans all hold,
 * booleans side by side. Without their answers, every step would be one whose gradients
 * overflow. */
static int answer(unsigned char *to, size_t count) {
    memset(to, null_gpu_finite(), count);
    null_gpu_know(to, count);
    return 0;
}
int null_is_finite(size_t count, const void *in, unsigned char *out, void *stream) {
    return answer(out, count);
}
int null_all(const void *in, const void *shape, int first_axis, int how, void *work,
             unsigned char *out, void *s) {
    return answer(out, 1);
}
int null_stack(size_t count, size_t inputs, size_t inner, void **in, unsigned char *out, void *s) {
    return answer(out, count);
}
#endif

#ifdef IN_libnccl_so_2
TEXT(ncclGetErrorString);
static size_t element(int type) {
    static const size_t bytes[] = {1, 1, 4, 4, 8,
                                   8, 2, 4, 8, 2}; /* in the order of ncclDataType_t */
    return type >= 0 && type < (int)(sizeof bytes / sizeof *bytes) ? bytes[type] : 4;
}
struct unique {
    char bytes[128];
};
int ncclCommInitRank(void **communicator, int size, struct unique id, int rank) {
    const char *works = getenv("NULL_GPU_NCCL");
    if (works && *works == '0') return 2; /* ncclSystemError */
    null_gpu_count(COMMUNICATOR, 0);
    *communicator = calloc(1, 8);
    return 0;
}
static int collective(enum kind kind, const void *from, void *to, size_t bytes) {
    null_gpu_count(kind, bytes);
    if (from != to) memmove(to, from, bytes); /* as if the other ranks had sent zeros */
    return 0;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, void *communicator,
                  void *stream) {
    return collective(ALL_REDUCE, from, to, count * element(type));
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *communicator,
                  void *stream) {
    return collective(BROADCAST, from, to, count * element(type));
}
#endif
