//! How the ranks of a run share an iteration: its images lie in a line, group after group, and each rank has an
//! equal part of it. With a prompt a rank or more those are whole groups; with fewer, a group's members are spread.

use std::fmt;
use std::ops::Range;

use anyhow::{Result, ensure};
use cluster::Group;
use tch::Tensor;

use super::GroupConfig;
use crate::reward::RewardKind;

/// Who has which of P groups of G members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Division {
    rank: usize,
    world: usize,
    n_groups: usize,
    group_size: usize,
}

impl Division {
    /// That of an iteration of `n_groups` prompts among `ranks`.
    ///
    /// # Errors
    /// When the images cannot be shared evenly (names the nearest numbers of prompts that can), or a reward that
    /// compares a group's images would see only some.
    pub(crate) fn new(ranks: &Group, config: &GroupConfig, n_groups: usize) -> Result<Self> {
        let (rank, world, group_size) = (ranks.rank(), ranks.world(), config.group_size);
        let is_even = |n: &usize| is_even(*n, group_size, world);
        let below = (1..n_groups).rev().find(is_even).map_or(String::new(), |n| format!("{n} or "));
        ensure!(
            is_even(&n_groups),
            "prompts_per_iteration = {n_groups}: {world} ranks cannot share them evenly; the nearest is {below}{}",
            enough(n_groups, group_size, world)
        );
        let division = Self { rank, world, n_groups, group_size };
        let compares = |kind: &RewardKind| matches!(kind, RewardKind::Pairwise { .. });
        for reward in config.rewards.iter().filter(|reward| compares(&reward.kind)) {
            ensure!(
                !division.is_spread(),
                "reward {:?} compares the images of a group, which {world} ranks with {n_groups} prompts share: take \
                 {world} prompts_per_iteration or fewer ranks",
                reward.name
            );
        }
        Ok(division)
    }

    /// Whether ranks share a group.
    pub(crate) fn is_spread(&self) -> bool {
        self.n_groups < self.world
    }

    /// Groups that this rank has a part of.
    pub(crate) fn groups(&self) -> Range<usize> {
        let members = self.nodes(self.rank, self.group_size);
        members.start / self.group_size..members.end.div_ceil(self.group_size)
    }

    /// Members of `group` that are this rank's.
    pub(crate) fn members(&self, group: usize) -> Range<usize> {
        self.members_of(self.rank, group)
    }

    fn members_of(&self, rank: usize, group: usize) -> Range<usize> {
        let (all, first) = (self.nodes(rank, self.group_size), group * self.group_size);
        let within = |member: usize| member.clamp(first, first + self.group_size) - first;
        within(all.start)..within(all.end)
    }

    /// Ranks that have members of `group`, in their order.
    pub(crate) fn ranks_of(&self, group: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.world).filter(move |&rank| !self.members_of(rank, group).is_empty())
    }

    /// Where groups begin as `width` states each, which become G later: those that `rank` goes on with, counted over
    /// all groups; every state is of the rank that has the first member it leads to.
    pub(crate) fn nodes(&self, rank: usize, width: usize) -> Range<usize> {
        let member = |rank: usize| self.n_groups * self.group_size * rank / self.world;
        let node = |rank: usize| (member(rank) * width).div_ceil(self.group_size);
        node(rank)..node(rank + 1)
    }

    /// [`Division::nodes`] of this rank, counted from the first of its groups.
    pub(crate) fn own_nodes(&self, width: usize) -> Range<usize> {
        let (nodes, first) = (self.nodes(self.rank, width), self.groups().start * width);
        nodes.start - first..nodes.end - first
    }

    pub(crate) fn n_groups(&self) -> usize {
        self.n_groups
    }

    /// The rows of all held groups, `width` a group, of which this rank gives its own; `[own, …]` becomes
    /// `[held · width, …]`, the same bits on every rank that has a row.
    ///
    /// # Errors
    /// When the ranks cannot put their rows together.
    pub(crate) fn gathered(&self, ranks: &Group, own: &Tensor, width: usize) -> Result<Tensor> {
        let n_of = |rank: usize| self.nodes(rank, width).len();
        let each = (0..self.world).map(n_of).max().unwrap_or(0);
        let mut padding = vec![0; 2 * own.dim()];
        padding[2 * own.dim() - 1] = (each - n_of(self.rank)) as i64;
        let all = ranks.all_gather(&own.constant_pad_nd(&padding).contiguous())?;
        let rows =
            (0..self.world).flat_map(|rank| (0..n_of(rank)).map(move |row| rank * each + row));
        let held = self.groups();
        let held: Vec<i64> =
            rows.skip(held.start * width).take(held.len() * width).map(|row| row as i64).collect();
        Ok(all.index_select(0, &Tensor::from_slice(&held).to_device(own.device())))
    }

    /// What this rank does of all there is to do for `group`, in proportion to its members.
    pub(crate) fn part<'a, T>(&self, group: usize, all: &'a [T]) -> &'a [T] {
        let Range { start, end } = self.members(group);
        let at = |member: usize| (all.len() * member).div_ceil(self.group_size);
        &all[at(start)..at(end)]
    }
}

impl fmt::Display for Division {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { world, n_groups, group_size, .. } = *self;
        if self.is_spread() {
            let n = n_groups * group_size;
            write!(f, "{} of the {n} images of {n_groups} prompts a rank", n / world)
        } else {
            write!(f, "{} of {n_groups} prompts a rank", n_groups / world)
        }
    }
}

/// Whether `world` ranks can share so many groups.
fn is_even(n_groups: usize, group_size: usize, world: usize) -> bool {
    let n = if n_groups < world { n_groups * group_size } else { n_groups };
    n.is_multiple_of(world)
}

/// The fewest groups, `n_groups` at least, that `world` ranks can share.
pub(crate) fn enough(n_groups: usize, group_size: usize, world: usize) -> usize {
    let mut near = n_groups..=n_groups + world;
    near.find(|&n| is_even(n, group_size, world)).expect("a multiple of the ranks is even")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divisions(world: usize, n_groups: usize, group_size: usize) -> Vec<Division> {
        assert!(is_even(n_groups, group_size, world), "{world} {n_groups} {group_size}");
        (0..world).map(|rank| Division { rank, world, n_groups, group_size }).collect()
    }

    #[test]
    fn whole_groups_where_there_are_enough() {
        for division in divisions(3, 6, 4) {
            assert!(!division.is_spread());
            assert_eq!(division.groups(), 2 * division.rank..2 * division.rank + 2);
            assert_eq!(division.own_nodes(4), 0..8);
            assert_eq!(division.part(2 * division.rank, &[1, 2, 3]), [1, 2, 3]);
        }
        assert_eq!(divisions(1, 5, 4)[0].groups(), 0..5);
    }

    #[test]
    fn members_in_line_where_there_are_not() {
        let all = divisions(3, 2, 6);
        assert!(all[0].is_spread());
        let held: Vec<Range<usize>> = all.iter().map(Division::groups).collect();
        assert_eq!(held, [0..1, 0..2, 1..2]);
        assert_eq!([0, 1].map(|group| all[1].members(group)), [4..6, 0..2]);
        assert_eq!(all[1].ranks_of(1).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(all[0].to_string(), "4 of the 12 images of 2 prompts a rank");
    }

    /// At every width of a tree, and of what there is to learn.
    #[test]
    fn everything_is_done_once_by_a_rank_that_has_its_group() {
        for (world, n_groups, group_size) in
            [(4, 1, 4), (4, 3, 4), (8, 2, 16), (3, 1, 12), (12, 2, 12)]
        {
            let all = divisions(world, n_groups, group_size);
            for width in [1, 2, 4, group_size] {
                let mut next = 0;
                for division in &all {
                    let nodes = division.nodes(division.rank, width);
                    assert_eq!(nodes.start, next);
                    let held = division.groups();
                    assert!(nodes.is_empty() || held.start * width <= nodes.start);
                    assert!(nodes.is_empty() || nodes.end <= held.end * width);
                    next = nodes.end;
                }
                assert_eq!(next, n_groups * width);
            }
            for n_items in 0..7 {
                let items: Vec<usize> = (0..n_items).collect();
                for group in 0..n_groups {
                    let done: Vec<usize> = all
                        .iter()
                        .flat_map(|division| division.part(group, &items))
                        .copied()
                        .collect();
                    assert_eq!(done, items);
                }
            }
        }
    }

    #[test]
    fn what_is_not_even_has_an_even_number_near() {
        assert_eq!(
            [(1, 4, 2), (1, 4, 3), (3, 4, 2), (5, 4, 2)].map(|(p, g, w)| is_even(p, g, w)),
            [true, false, false, false]
        );
        assert_eq!((enough(1, 4, 3), enough(32, 12, 256), enough(32, 12, 128)), (3, 64, 32));
    }
}
