//! Normalisations and GELU. In 16 bits the decomposed forms compute in f32, as the single nodes do inside.

use flow::ops::{Gelu, Ops, ParamPath};

use super::{Builder, Kind, Value};
use crate::element::Float;
use crate::proto::AttributeProto as Attribute;
use crate::target::Form;

impl Builder {
    pub(super) fn layer_norm_of(
        &self,
        x: Value,
        width: usize,
        affine: Option<&ParamPath>,
        eps: f64,
    ) -> Value {
        let x = self.straight(x);
        let attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", eps)];
        let y = if let Some(path) = affine {
            let weight = self.float_parameter(&path.at("weight"), &[width], x.float());
            let bias = self.float_parameter(&path.at("bias"), &[width], x.float());
            self.node_at(path.as_str(), "LayerNormalization", &[x, weight, bias], attributes)
        } else {
            let ones = self.cast(self.floats(&vec![1.0; width], &[width]), x.kind);
            self.node("LayerNormalization", &[x, ones], attributes, x.kind)
        };
        self.cast(y, self.arithmetic())
    }

    /// Heads may lie in either order: the last axis is the same.
    pub(super) fn rms_norm_of(&self, path: &ParamPath, x: Value, width: usize, eps: f64) -> Value {
        let place = |y: Value| Value { heads: x.heads, swapped: x.swapped, ..y };
        let weight = path.at("weight");
        if self.dialect.table.form == Form::Single {
            let weight = self.float_parameter(&weight, &[width], x.float());
            let attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", eps)];
            let y = self.node_at(path.as_str(), "RMSNormalization", &[x.raw(), weight], attributes);
            return self.cast(place(y), self.arithmetic());
        }
        let wide = self.wide(x).raw();
        let squares = self.mul(&wide, &wide);
        let along = [squares, self.ints(&[-1])];
        let mean = self.node("ReduceMean", &along, vec![Attribute::int("keepdims", 1)], wide.kind);
        let root = self.unary("Sqrt", self.affine(&mean, 1.0, eps));
        let normed = self.node("Div", &[wide, root], vec![], wide.kind);
        let weight = self.float_parameter(&weight, &[width], Float::F32);
        self.cast(place(self.mul(&normed, &weight)), self.arithmetic())
    }

    pub(super) fn group_norm_of(
        &self,
        path: &ParamPath,
        x: Value,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> Value {
        let weight = self.param(&path.at("weight"), &[channels]);
        let bias = self.param(&path.at("bias"), &[channels]);
        let eps = Attribute::float("epsilon", eps);
        if self.dialect.table.form == Form::Single {
            let attributes = vec![Attribute::int("num_groups", groups as i64), eps];
            return self.node_at(
                path.as_str(),
                "GroupNormalization",
                &[x, weight, bias],
                attributes,
            );
        }
        let grouped = [x, self.ints(&[0, groups as i64, -1])];
        let grouped = self.node("Reshape", &grouped, vec![], x.kind);
        let constant = |value: f32| self.cast(self.floats(&vec![value; groups], &[groups]), x.kind);
        let inputs = [grouped, constant(1.0), constant(0.0)];
        let normed = self.node("InstanceNormalization", &inputs, vec![eps], x.kind);
        let normed = self.reshape_like(&normed, &x);
        let of_channel = |values: Value| {
            self.node("Unsqueeze", &[values, self.ints(&[1, 2])], vec![], values.kind)
        };
        self.add(&self.mul(&normed, &of_channel(weight)), &of_channel(bias))
    }

    pub(super) fn gelu_of(&self, x: Value, form: Gelu) -> Value {
        if self.dialect.table.form == Form::Single {
            let form = match form {
                Gelu::Exact => "none",
                Gelu::Tanh => "tanh",
            };
            return self.node("Gelu", &[x], vec![Attribute::text("approximate", form)], x.kind);
        }
        let wide = self.wide(x);
        let inner = match form {
            Gelu::Exact => {
                self.unary("Erf", self.affine(&wide, std::f64::consts::FRAC_1_SQRT_2, 0.0))
            }
            Gelu::Tanh => {
                let square = self.mul(&wide, &wide);
                let factor = self.affine(&square, 0.044_715, 1.0);
                let root = (2.0 / std::f64::consts::PI).sqrt();
                let inner = self.affine(&self.mul(&wide, &factor), root, 0.0);
                self.unary("Tanh", inner)
            }
        };
        let half = self.affine(&wide, 0.5, 0.0);
        self.cast(self.mul(&half, &self.affine(&inner, 1.0, 1.0)), Kind::Float(x.float()))
    }
}
