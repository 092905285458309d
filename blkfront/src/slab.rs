//! A fixed number of places, found by number.

/// No place.
pub(crate) const NONE: u32 = u32::MAX;

#[derive(Debug)]
enum Place<T> {
    Free { next: u32 },
    Used(T),
}

/// Holds up to a fixed number of values; all memory is allocated at the start.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    places: Box<[Place<T>]>,
    free: u32,
    len: usize,
}

impl<T> Slab<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = u32::try_from(capacity).unwrap_or(NONE - 1);
        let next = |n| if n == capacity { NONE } else { n };
        let places = (1..=capacity).map(|n| Place::Free { next: next(n) }).collect();
        Self { places, free: if capacity == 0 { NONE } else { 0 }, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts a value into the place that was freed last.
    pub(crate) fn insert(&mut self, value: T) -> Option<u32> {
        self.insert_with(|_| value)
    }

    /// As [`Slab::insert`], of a value that may know its number.
    #[inline]
    pub(crate) fn insert_with(&mut self, value: impl FnOnce(u32) -> T) -> Option<u32> {
        let key = self.free;
        let place = self.places.get_mut(key as usize)?;
        let Place::Free { next } = *place else { return None };
        *place = Place::Used(value(key));
        self.free = next;
        self.len += 1;
        Some(key)
    }

    pub(crate) fn get(&self, key: u32) -> Option<&T> {
        match self.places.get(key as usize) {
            Some(Place::Used(value)) => Some(value),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, key: u32) -> Option<&mut T> {
        match self.places.get_mut(key as usize) {
            Some(Place::Used(value)) => Some(value),
            _ => None,
        }
    }

    pub(crate) fn remove(&mut self, key: u32) -> Option<T> {
        let place = self.places.get_mut(key as usize)?;
        if matches!(place, Place::Free { .. }) {
            return None;
        }
        match std::mem::replace(place, Place::Free { next: self.free }) {
            Place::Used(value) => {
                self.free = key;
                self.len -= 1;
                Some(value)
            }
            Place::Free { .. } => None,
        }
    }

    /// Takes everything out, in the order of the places.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        (0..self.places.len() as u32).filter_map(|key| self.remove(key))
    }
}
