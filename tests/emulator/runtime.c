// A CUDA runtime and driver whose one GPU is this host. Preloaded as libcuda.so.1, it stands before NVIDIA's libraries:
// device memory is the host's, and a stream has done what it is given when the call returns. PyTorch's own kernels are
// refused (aten.cpp serves their ops), Triton's are taken and do nothing, csrc/cuda's run in the emulator (simt.h).
// What is not here fails as on a machine without a GPU.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int setting(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}
static int arch(void) { return setting("FAKE_DEVICE_ARCH", 90); }
static size_t capacity(void) { return (size_t)setting("FAKE_DEVICE_MIB", 1 << 14) << 20; }

// Functions that have nothing to do.
#define SUCCEEDS(name)                      \
  int succeeds_##name(void) __asm__(#name); \
  int succeeds_##name(void) { return 0; }
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventSynchronize)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaUnregisterFatBinary)

// --- the device ----------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -1, cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) { return *priority = 0, cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                         ? "no error"
         : error == cudaErrorMemoryAllocation         ? "out of memory"
         : error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
         : error == cudaErrorNotSupported             ? "not supported by the fake CUDA device"
                                                      : "an error of the fake CUDA device";
}

static int attribute(int name) {
  const int shared = arch() < 80 ? 64 << 10 : 227 << 10;
  const int values[][2] = {{cudaDevAttrComputeCapabilityMajor, arch() / 10},
                           {cudaDevAttrComputeCapabilityMinor, arch() % 10},
                           {cudaDevAttrMultiProcessorCount, 132},
                           {cudaDevAttrWarpSize, 32},
                           {cudaDevAttrMaxThreadsPerBlock, 1024},
                           {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
                           {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
                           {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared},
                           {cudaDevAttrMaxSharedMemoryPerMultiprocessor, shared},
                           {cudaDevAttrMaxRegistersPerBlock, 1 << 16},
                           {cudaDevAttrL2CacheSize, 4 << 20},
                           {cudaDevAttrClockRate, 1000000}};  // kHz
  for (size_t i = 0; i < sizeof values / sizeof *values; ++i)
    if (values[i][0] == name) return values[i][1];
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr name, int device) {
  return *value = attribute(name), cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "the fake CUDA device");
  p->totalGlobalMem = capacity();
  p->major = attribute(cudaDevAttrComputeCapabilityMajor);
  p->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->warpSize = attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  return cudaSuccess;
}

// --- memory --------------------------------------------------------------------------------------------------------

static struct Block {
  char* begin;
  size_t bytes;
  int on_device;
} blocks[1 << 16];
static int block_count;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// What lies behind a block: it may not be written, and whoever reads it reads NaN.
enum { kGuard = 1024 };
static size_t extent(size_t bytes) { return (bytes + kGuard + 511) / 512 * 512; }

static cudaError_t take(void** pointer, size_t bytes, int on_device) {
  cudaError_t error = cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  if ((!on_device || used + bytes <= capacity()) && block_count < 1 << 16) {
    char* begin = aligned_alloc(512, extent(bytes));
    if (begin) {
      const size_t first = bytes <= 1 << 24 ? 0 : bytes;  // nobody may count on zeros
      memset(begin + first, 0xFF, extent(bytes) - first);
      if (on_device) used += bytes;
      blocks[block_count++] = (struct Block){begin, bytes, on_device};
      *pointer = begin;
      error = cudaSuccess;
    }
  }
  pthread_mutex_unlock(&lock);
  return error;
}

static struct Block* find(const void* pointer) {
  const char* p = pointer;
  for (int i = 0; i < block_count; ++i)
    if (p >= blocks[i].begin && p < blocks[i].begin + extent(blocks[i].bytes)) return &blocks[i];
  return NULL;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return take(pointer, bytes, 1); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) { return take(pointer, bytes, 0); }
cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  pthread_mutex_lock(&lock);
  struct Block* block = find(pointer);
  if (block && block->begin != pointer) block = NULL;
  if (block) {
    for (size_t i = block->bytes; i < extent(block->bytes); ++i)
      if (block->begin[i] != (char)0xFF) {
        fprintf(stderr, "byte %zu of %zu on the fake CUDA device was written\n", i, block->bytes);
        abort();
      }
    if (block->on_device) used -= block->bytes;
    free(block->begin);
    *block = blocks[--block_count];
  }
  pthread_mutex_unlock(&lock);
  return block ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = capacity(), *available = *total - used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  pthread_mutex_lock(&lock);
  const struct Block* block = find(pointer);
  if (block) {
    attributes->type = block->on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    attributes->devicePointer = (void*)pointer;
    attributes->hostPointer = block->on_device ? NULL : (void*)pointer;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

// --- streams, events, graphs ---------------------------------------------------------------------------------------

typedef void (*Work)(void*);
static struct Graph {
  int count;
  struct {
    Work run;
    void* data;
  } work[1 << 12];
}* capturing;
static void* last_stream;

// For aten.cpp, the emulator's launches and the tests.
int fake_device_capturing(void) { return capturing != NULL; }
void fake_device_record(Work run, void* data) {
  if (capturing->count == 1 << 12) fprintf(stderr, "too much for a graph on the fake CUDA device\n"), abort();
  capturing->work[capturing->count].run = run;
  capturing->work[capturing->count++].data = data;
}
void fake_device_launched(void* stream) { last_stream = stream; }
void* fake_device_last_stream(void) { return last_stream; }

static cudaError_t wait(void) { return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return wait(); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait(); }

static cudaError_t copy(void* to, const void* from, size_t bytes) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;  // aten.cpp records what may be captured
  memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  return copy(to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = malloc(1);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = calloc(1, sizeof(double));
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(double*)event = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = (float)(*(double*)end - *(double*)begin);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  if (id) *id = (unsigned long long)capturing;
  if (graph) *graph = (cudaGraph_t)capturing;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  capturing = calloc(1, sizeof *capturing);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = (cudaGraph_t)capturing, capturing = NULL;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = ((struct Graph*)graph)->count;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  struct Graph* graph = (struct Graph*)executable;
  for (int i = 0; i < graph->count; ++i) graph->work[i].run(graph->work[i].data);
  return cudaSuccess;
}

// --- kernels -------------------------------------------------------------------------------------------------------

static struct {
  const void* host;
  const char* name;
}* kernels;
static int kernel_count;

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, void* a,
                            void* b, void* c, void* d, int* e) {
  if ((kernel_count & (kernel_count - 1)) == 0)
    kernels = realloc(kernels, 2 * (kernel_count ? kernel_count : 1) * sizeof *kernels);
  kernels[kernel_count].host = host;
  kernels[kernel_count++].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  return *kernel = (cudaKernel_t)host, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  const char* name = "kernel of this kind";
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].host == host) name = kernels[i].name;
  if (strstr(name, "spin_kernel")) return cudaSuccess;  // torch.cuda._sleep
  fprintf(stderr, "the fake CUDA device has no %s\n", name);
  return cudaErrorNotSupported;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// --- the driver, for Triton, Inductor and PyTorch's start ----------------------------------------------------------

static int unsupported(void) { return CUDA_ERROR_NOT_SUPPORTED; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void*)unsupported;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

SUCCEEDS(cuInit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuCtxSetLimit)
static int context;
CUresult cuCtxGetCurrent(CUcontext* current) { return *current = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* current, CUdevice device) { return cuCtxGetCurrent(current); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}
CUresult cuGetErrorString(CUresult error, const char** words) {
  return *words = cudaGetErrorString((cudaError_t)error), CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  pthread_mutex_lock(&lock);
  const struct Block* block = find((void*)pointer);
  pthread_mutex_unlock(&lock);
  *(CUdeviceptr*)value = pointer;
  return block && block->on_device ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
CUresult cuModuleLoad(CUmodule* module, const char* path) { return *module = (CUmodule)&context, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return *function = (CUfunction)module, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                        unsigned threads_z, unsigned shared, CUstream stream, void** arguments, void** extra) {
  fake_device_launched(stream);
  return x && y && z && x <= 0x7FFFFFFF && y <= 0xFFFF && z <= 0xFFFF ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, arguments, extra);
}
