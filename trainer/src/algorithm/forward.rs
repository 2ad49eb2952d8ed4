//! Final images noised anew, which methods without a ratio of trajectories learn from.

use tch::Tensor;

use super::{Item, Setting, numbers, stack};
use crate::group::experience::Experience;
use crate::group::seeds::{Use, family};
use crate::network::model::Model;

/// Streams of noise between two draws: more than a run has images.
const DRAW_BITS: u32 = 48;

/// M final images x0 with noise eps at times t: x_t = (1 − t)·x0 + t·eps, in f32.
pub(super) struct Noised {
    /// `[M, S, C]`.
    pub(super) x0: Tensor,
    /// `[M, S, C]`.
    pub(super) x_t: Tensor,
    /// Times `[M]`.
    pub(super) t: Tensor,
    /// The velocity that leads from x0 to eps, `[M, S, C]`.
    pub(super) target: Tensor,
}

impl Noised {
    /// Of each item the image of its member, at the time of its call; members of a group share their noise at
    /// one time where it `is_shared`.
    pub(super) fn new(
        setting: &Setting<'_>,
        model: &Model,
        experience: &Experience,
        items: &[Item],
        is_shared: bool,
    ) -> Self {
        let trajectory = &experience.trajectory;
        let x0 = stack(items, |item| experience.row(&trajectory.x0, item.group, item.member));
        let t = numbers(items, &x0, |item| trajectory.calls[item.call].step.t);
        let noise = family(setting.group.seed, Use::Forward);
        let n_calls = trajectory.calls.len() as u64;
        let of_item = |item: &Item| {
            let member = if is_shared { 0 } else { item.member };
            let first = experience.stream(item.group, member) * n_calls + item.call as u64;
            let stream = first + (item.draw << DRAW_BITS);
            noise.normal(stream, experience.size.len())
        };
        let eps: Vec<Vec<f32>> = items.iter().map(of_item).collect();
        Self::of(x0, &model.pack(&eps, &experience.size), t)
    }

    /// Of images `x0` and noise `eps`, `[M, S, C]`, at times `t`, `[M]`.
    fn of(x0: Tensor, eps: &Tensor, t: Tensor) -> Self {
        let wide = t.reshape([-1, 1, 1]);
        let x_t = &x0 * (1.0 - &wide) + eps * &wide;
        Self { target: eps - &x0, x0, x_t, t }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_from_the_image_to_the_noise() {
        let row = |values: [f32; 2]| Tensor::from_slice(&values).reshape([1, 1, 2]);
        let (x0, eps) = (row([4.0, -2.0]), row([1.0, 3.0]));
        let noised = Noised::of(x0.copy(), &eps, Tensor::from_slice(&[0.25f32]));
        assert_eq!(noised.x_t, row([3.25, -0.75]));
        assert_eq!(noised.target, row([-3.0, 5.0]));
        // Along the velocity the noise is as far as there is time left, and the image as far as has gone.
        assert_eq!(&noised.x_t + 0.75 * &noised.target, eps);
        assert_eq!(noised.x_t - 0.25 * noised.target, x0);
    }
}
