// What PyTorch asks CUDA's runtime before it chooses a kernel, answered as an H100 would: loaded in
// front of the real library, on a machine without a GPU. Nothing can be computed with it.
#include <cuda_runtime_api.h>
#undef cudaGetDeviceProperties

#include <cstring>

extern "C" {

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "NVIDIA H100 80GB HBM3");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = 80ull << 30;
  p->warpSize = 32;
  p->sharedMemPerBlockOptin = 232448;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
}
