"""3×3 convolutions with fewer multiplications, for OpenVINO on x86: Winograd's F(2×2, 3×3) and F(4×4, 3×3).

`choice` measures once, on this machine, for which layers they are faster than OpenVINO's own convolution.
`layers` puts them into a model in place of the convolutions. `library` compiles the C++ next to it:
`weights.cpp` packs the weights when an engine is built, `kernel.cpp` computes, and `openvino_extension.cpp`
makes it an operation of OpenVINO's.
"""
