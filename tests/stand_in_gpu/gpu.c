// What torch, Triton and ftfast ask of CUDA, on a machine without a GPU: two devices whose memory is the machine's and
// whose kernels do nothing. Streams, events and captures are kept account of, and what a GPU would refuse is refused.
// Every other function of CUDA returns 0; build.py makes them.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define DEVICES 2
#define LARGEST 4096 /* streams, and blocks of memory, at once */
#define LIBRARY_NAME "Stand-in GPU"

typedef struct {
  unsigned long launches; /* read by Python at the address that a stream's handle is */
  int device, captured;
  unsigned long work, waited_for; /* of a capture: what the stream did, and up to where another waited for it */
} Stream;
typedef struct {
  Stream* stream;
  unsigned long work;
  int captured;
} Event;
typedef struct {
  unsigned long nodes;
} Graph;
typedef struct {
  char* begin;
  size_t bytes;
  int device; /* -1: the host's, page-locked */
} Block;

// In the order that running.py names them in.
struct {
  unsigned long launches, copies, replays, captured, synchronisations, allocations, legacy, uncaptured, pageable,
      refused, kernels, captured_kernels;
} stand_in_counts;

static __thread int current;
static int captures;
static unsigned long long begun;  // captures so far, whose numbers tell them apart
static Stream *streams[LARGEST], legacy[DEVICES] = {{.device = 0}, {.device = 1}};
static int stream_count;
static Block blocks[LARGEST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define ADD(counter, count) __atomic_fetch_add(&stand_in_counts.counter, count, __ATOMIC_RELAXED)
#define REFUSE(error) return ADD(refused, 1), error

static int is_legacy(cudaStream_t handle) { return (uintptr_t)handle <= 2; }
static Stream* stream_of(cudaStream_t handle) { return is_legacy(handle) ? &legacy[current] : (Stream*)handle; }

// Something is given to a stream: it runs, or becomes a node of the graph that captures it.
static cudaError_t give(cudaStream_t handle, unsigned long* counter) {
  Stream* stream = stream_of(handle);
  if (stream->device != current) REFUSE(cudaErrorInvalidResourceHandle);
  __atomic_fetch_add(&stream->launches, 1, __ATOMIC_RELAXED);
  if (stream->captured) {
    ++stream->work;
    ADD(captured, 1);
    return cudaSuccess;
  }
  __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
  if (is_legacy(handle)) ADD(legacy, 1);
  if (captures) ADD(uncaptured, 1);
  return cudaSuccess;
}

// A kernel of so many blocks is. Sums of it tell two sets of kernels apart, in whatever order they came.
static cudaError_t launch_of(cudaStream_t handle, const void* kernel, unsigned long x, unsigned long y, unsigned long z) {
  unsigned long digest = (((uintptr_t)kernel * 31 + x) * 31 + y) * 31 + z;
  digest = (digest ^ digest >> 29) * 0xbf58476d1ce4e5b9;
  digest ^= digest >> 32;
  if (stream_of(handle)->captured) ADD(captured_kernels, digest);
  else ADD(kernels, digest);
  return give(handle, &stand_in_counts.launches);
}

unsigned long stand_in_launch(int device, void* stream) {
  return device == current ? give(stream, &stand_in_counts.launches) : cudaErrorInvalidDevice;
}

static cudaError_t wait_for(int forbidden) {
  if (forbidden) REFUSE(cudaErrorStreamCaptureUnsupported);
  ADD(synchronisations, 1);
  return cudaSuccess;
}

// Devices

cudaError_t cudaGetDeviceCount(int* count) { return *count = DEVICES, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) { return *can = 0, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidResourceHandle ? "stream of another device" : "refused by the stand-in GPU";
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return strncpy(text, device ? "0000:01:00.0" : "0000:00:00.0", length), cudaSuccess;
}

// Runtime and driver number attributes alike. Those of an H100.
static int attribute(int which) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    default: return 1;
  }
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr which, int device) {
  return *value = attribute(which), cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, LIBRARY_NAME);
  found->totalGlobalMem = 80ull << 30;
  found->major = 9;
  found->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  found->warpSize = 32;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  found->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = INT32_MAX;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  found->unifiedAddressing = found->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}

// Memory: pages that are zero, and cost nothing until they are written to

static Block* block_of(const void* address) {
  for (Block* block = blocks; block < blocks + LARGEST; ++block)
    if ((size_t)((const char*)address - block->begin) < block->bytes) return block;
  return NULL;
}
static cudaError_t allocate(void** address, size_t bytes, int device) {
  void* pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return cudaErrorMemoryAllocation;
  ADD(allocations, 1);
  pthread_mutex_lock(&lock);
  for (Block* block = blocks; block < blocks + LARGEST; ++block)
    if (!block->bytes) {
      *block = (Block){*address = pages, bytes, device};
      break;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
static cudaError_t release(void* address) {
  pthread_mutex_lock(&lock);
  Block* block = block_of(address);
  if (block) {
    munmap(block->begin, block->bytes);
    *block = (Block){0};
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** address, size_t bytes) { return allocate(address, bytes, current); }
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned flags) { return allocate(address, bytes, -1); }
cudaError_t cudaFree(void* address) { return release(address); }
cudaError_t cudaFreeHost(void* address) { return release(address); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) { return *available = *total = 80ull << 30, cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* address) {
  Block* block = block_of(address);
  memset(found, 0, sizeof *found);
  if (!block) return cudaSuccess;
  found->type = block->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  found->device = block->device < 0 ? 0 : block->device;
  found->devicePointer = (void*)address;
  return cudaSuccess;
}
// What comes from a device was never computed: zeros, which are finite, and yes to whatever was asked of one byte.
static void move(void* to, const void* from, size_t bytes) {
  Block *there = block_of(to), *here = block_of(from);
  int to_device = there && there->device >= 0, from_device = here && here->device >= 0;
  if (!from_device) memcpy(to, from, bytes);
  else if (!to_device) memset(to, bytes == 1, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  move(to, from, bytes);
  return wait_for(0);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (!block_of(to) || !block_of(from)) ADD(pageable, 1);
  move(to, from, bytes);
  return give(stream, &stand_in_counts.copies);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return memset(to, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return give(stream, &stand_in_counts.launches);
}

// Streams and events

static cudaError_t make_stream(cudaStream_t* handle) {
  Stream* stream = calloc(1, sizeof *stream);
  stream->device = current;
  pthread_mutex_lock(&lock);
  streams[stream_count++ % LARGEST] = stream;
  pthread_mutex_unlock(&lock);
  return *handle = (cudaStream_t)stream, cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) { return make_stream(handle); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) { return make_stream(handle); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  return make_stream(handle);
}
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  if (stream_of(handle)->captured) REFUSE(cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) { return wait_for(stream_of(handle)->captured); }
cudaError_t cudaDeviceSynchronize(void) { return wait_for(captures); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  return *handle = calloc(1, sizeof(Event)), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) { return free(handle), cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned flags) {
  Stream* stream = stream_of(on);
  if (stream->device != current) REFUSE(cudaErrorInvalidResourceHandle);
  *(Event*)handle = (Event){stream, stream->work, stream->captured};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) { return cudaEventRecordWithFlags(handle, on, 0); }
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  if (((Event*)handle)->captured) REFUSE(cudaErrorCapturedEvent);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) { return wait_for(((Event*)handle)->captured); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  return *milliseconds = 1, cudaSuccess;
}
// A captured event draws whoever waits for it into the capture; from outside nothing leads into one.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t of, unsigned flags) {
  Stream* stream = stream_of(handle);
  Event* event = (Event*)of;
  if (stream->captured && event->stream && !event->captured) REFUSE(cudaErrorStreamCaptureIsolation);
  if (!event->captured) return cudaSuccess;
  if (is_legacy(handle)) REFUSE(cudaErrorStreamCaptureImplicit);
  if (stream == event->stream) return cudaSuccess;
  stream->captured = 1;
  ++stream->work;
  if (event->stream->waited_for < event->work) event->stream->waited_for = event->work;
  return cudaSuccess;
}

// Captures and graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  if (is_legacy(handle)) REFUSE(cudaErrorStreamCaptureUnsupported);
  stream_of(handle)->captured = 1;
  ++captures;
  ++begun;
  return cudaSuccess;
}
static unsigned long nodes_before;
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  int unjoined = 0;
  for (int place = 0; place < stream_count && place < LARGEST; ++place) {
    Stream* stream = streams[place];
    unjoined += stream->captured && stream != (Stream*)handle && stream->waited_for < stream->work;
    stream->captured = stream->work = stream->waited_for = 0;
  }
  --captures;
  Graph* made = malloc(sizeof *made);
  made->nodes = stand_in_counts.captured - nodes_before;
  nodes_before = stand_in_counts.captured;
  *graph = (cudaGraph_t)made;
  if (unjoined) REFUSE(cudaErrorStreamCaptureUnjoined);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus* status) {
  *status = stream_of(handle)->captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  if (id) *id = stream_of(handle)->captured ? begun : 0;
  if (count) *count = 0;
  return cudaStreamIsCapturing(handle, status);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long flags) {
  return *instance = (cudaGraphExec_t)graph, cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return *count = ((Graph*)graph)->nodes, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
  return give(stream, &stand_in_counts.replays);
}

// Kernels

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  return &handle;
}
char __cudaInitModule(void** handle) { return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration.grid = grid, configuration.block = block;
  configuration.shared = shared, configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *(void**)stream = configuration.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch_of(stream, kernel, grid.x, grid.y, grid.z);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch_of(stream, kernel, grid.x, grid.y, grid.z);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch, const void* kernel, void** arguments) {
  return launch_of(launch->stream, kernel, launch->gridDim.x, launch->gridDim.y, launch->gridDim.z);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* kernel, int block,
                                                                   size_t shared, unsigned flags) {
  return *count = 4, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* kernel, int block, size_t shared) {
  return *count = 4, cudaSuccess;
}

// The driver, which Triton talks to and torch for some functions by their names

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
static int contexts[DEVICES];
static CUcontext context_of(int device) { return (CUcontext)&contexts[device]; }
CUresult cuDriverGetVersion(int* version) { return cudaDriverGetVersion(version); }
CUresult cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count); }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  return strncpy(name, LIBRARY_NAME, length), CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return *value = attribute(which), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = context_of(device), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = context_of(current), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = (int*)context - contexts, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)contexts, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return *function = (CUfunction)contexts, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* found, CUpointer_attribute which, CUdeviceptr address) {
  Block* block = block_of((void*)address);
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)found = address;
  else *(int*)found = block && block->device > 0;
  return block ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                        unsigned threads_z, unsigned shared, CUstream stream, void** arguments, void** extra) {
  return launch_of(stream, function, x, y, z);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction function, void** arguments, void** extra) {
  return launch_of(launch->hStream, function, launch->gridDimX, launch->gridDimY, launch->gridDimZ);
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = cudaGetErrorString((cudaError_t)error), CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* launch) {
  return *count = 66, CUDA_SUCCESS;
}
