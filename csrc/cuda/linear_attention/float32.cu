#include "../device.cuh"

template void cxv::cuda::run<float>(Call, const Work&, const Launch&);
