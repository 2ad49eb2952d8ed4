//! Weights under other names than their file's.

use super::{Entry, Place, Values, Weights};

impl Weights {
    /// The weights by the names that `by` gives them; those it gives none are left out.
    #[must_use]
    pub fn renamed(mut self, by: impl Fn(&str) -> Option<String>) -> Self {
        let places = std::mem::take(&mut self.places).into_iter();
        self.places = places.filter_map(|(name, place)| Some((by(&name)?, place))).collect();
        self
    }

    /// Those that are not left out, with a notice of how many were, as `what`.
    #[must_use]
    pub fn without(mut self, what: &str, is_left_out: impl Fn(&str) -> bool) -> Self {
        let n = self.names().filter(|name| is_left_out(name)).count();
        if n > 0 {
            let path = self.path.display();
            self.notices.push(format!("{path}: {n} tensors of {what} are left out"));
            self.places.retain(|name, _| !is_left_out(name));
        }
        self
    }

    /// Those that `is_matrix` in the shape `[n_out, n_in]`, where they are convolutions of one pixel.
    #[must_use]
    pub fn as_matrices(mut self, is_matrix: impl Fn(&str) -> bool) -> Self {
        for (name, place) in &mut self.places {
            if matches!(place.shape[..], [_, _, 1, 1]) && is_matrix(name) {
                place.shape.truncate(2);
            }
        }
        self
    }

    /// What stands before `tail` in the name of a tensor, the shortest if there are several.
    pub fn before(&self, tail: &str) -> Option<&str> {
        self.names().filter_map(|name| name.strip_suffix(tail)).min_by_key(|prefix| prefix.len())
    }

    /// Their names in the files, scales included.
    pub fn stored_names(&self) -> impl Iterator<Item = &str> {
        self.places.values().flat_map(|place| {
            let scale = place.scale.iter().map(|(_, name)| name.as_str());
            scale.chain([place.stored.as_str()])
        })
    }

    /// All tensors, to be written as they are read.
    pub fn entries(&self) -> Vec<Entry<'_>> {
        let entry = |(name, place): (&'_ String, &'_ Place)| {
            let dtype = self.dtype(name)?;
            let (shape, name) = (place.shape.clone(), name.clone());
            let read = {
                let name = name.clone();
                move || Ok(self.get(&name).map(|view| view.bytes.into_owned()).unwrap_or_default())
            };
            Some(Entry { name, shape, dtype, values: Values::Made(Box::new(read)) })
        };
        self.places.iter().filter_map(entry).collect()
    }
}
