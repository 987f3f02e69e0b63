// OpenVINO's operation WinogradConvolution: y = conv(x) + bias + residual, a 3×3 convolution of stride 1, padding 1;
// with tile 3, of x doubled.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "kernel.hpp"

namespace lcm {

class WinogradConvolution : public ov::op::Op {
public:
    OPENVINO_OP("WinogradConvolution", "lcm_compile");

    WinogradConvolution() = default;
    WinogradConvolution(const ov::OutputVector& inputs, std::int64_t tile, std::int64_t outputs, std::int64_t bf16)
        : Op(inputs), tile_(tile), outputs_(outputs), bf16_(bf16) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        ov::PartialShape shape = get_input_partial_shape(0);
        shape[1] = outputs_;
        if (tile_ == 3)
            for (int i : {2, 3}) shape[i] = shape[i] * ov::Dimension(2);
        set_output_type(0, get_input_element_type(0), shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<WinogradConvolution>(inputs, tile_, outputs_, bf16_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("tile", tile_);
        visitor.on_attribute("outputs", outputs_);
        visitor.on_attribute("bf16", bf16_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Tensor &x = inputs[0], &weights = inputs[1], &bias = inputs[2];
        const ov::Shape shape = x.get_shape();
        const std::size_t scale = tile_ == 3 ? 2 : 1;
        outputs[0].set_shape({shape[0], static_cast<std::size_t>(outputs_), scale * shape[2], scale * shape[3]});
        Convolution layer{};
        layer.pictures = shape[0];
        layer.inputs = shape[1];
        layer.outputs = outputs_;
        layer.height = shape[2];
        layer.width = shape[3];
        layer.tile = tile_;
        layer.type = x.get_element_type() == ov::element::bf16 ? Type::bf16 : Type::f32;
        layer.products = bf16_ ? Type::bf16 : Type::f32;
        layer.x = x.data();
        layer.weights = weights.data();
        layer.bias = bias.data<float>();
        layer.bias_per_picture = bias.get_shape()[0] > 1;
        layer.residual = inputs.size() > 3 ? inputs[3].data() : nullptr;
        layer.y = outputs[0].data();
        kernel()(layer, tbb::this_task_arena::max_concurrency(), [](std::int64_t count, const auto& work) {
            tbb::parallel_for(std::int64_t(0), count, work);
        });
        return true;
    }

private:
    Compute kernel() const {
        if (bf16_) return winograd_avx512_bf16;
        return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") ? winograd_avx512 : winograd_avx2;
    }

    std::int64_t tile_ = 2, outputs_ = 0, bf16_ = 0;
};

}  // namespace lcm

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<lcm::WinogradConvolution>>()}));
