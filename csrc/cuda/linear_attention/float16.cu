#include "../device.cuh"

template void cxv::cuda::run<__half>(Call, const Work&, const Launch&);
