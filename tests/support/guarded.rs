//! Memory between two pages that nobody may touch: a load or a store past its ends kills the process,
//! whatever instruction does it.

use std::ops::Range;

/// Where a slice lies between the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// So many elements behind the first page.
    First(usize),
    /// So many elements before the last page.
    Last(usize),
}

/// Both edges, with nothing between, and with so little that what is aligned at 0 is not.
pub const EDGES: [Edge; 5] = [
    Edge::First(0),
    Edge::Last(0),
    Edge::First(1),
    Edge::Last(1),
    Edge::Last(8),
];

/// What the memory between the pages holds where no one wrote.
const UNTOUCHED: u8 = 0xa5;

pub struct Guarded {
    map: *mut u8,
    /// Bytes of the map, and of a page.
    len: usize,
    page: usize,
}

impl Guarded {
    /// Room for so many bytes.
    pub fn new(bytes: usize) -> Self {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let len = bytes.next_multiple_of(page).max(page) + 2 * page;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new map, which lies where nothing else does; the pages at its ends are its own.
        let map = unsafe {
            let map = libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0);
            assert!(map != libc::MAP_FAILED, "no memory for {len} bytes");
            let map = map.cast::<u8>();
            for guard in [map, map.add(len - page)] {
                assert_eq!(libc::mprotect(guard.cast(), page, libc::PROT_NONE), 0);
            }
            map.add(page).write_bytes(UNTOUCHED, len - 2 * page);
            map
        };
        Self { map, len, page }
    }

    /// Bytes of the map that a slice of `len` elements has.
    fn place<T>(&self, edge: Edge, len: usize) -> Range<usize> {
        let bytes = len * size_of::<T>();
        let start = match edge {
            Edge::First(gap) => self.page + gap * size_of::<T>(),
            Edge::Last(gap) => self.len - self.page - gap * size_of::<T>() - bytes,
        };
        assert!(start >= self.page && start + bytes <= self.len - self.page);
        start..start + bytes
    }

    /// `len` elements at an edge. `T` is a number, of which all bits are a value.
    pub fn slice<T: Copy>(&mut self, edge: Edge, len: usize) -> &mut [T] {
        let place = self.place::<T>(edge, len);
        // SAFETY: inside the map, all of whose bytes are initialised, and aligned, as pages and gaps
        // are multiples of an element; the slice borrows the map.
        unsafe { std::slice::from_raw_parts_mut(self.map.add(place.start).cast(), len) }
    }

    /// A slice with these elements.
    pub fn filled<T: Copy>(&mut self, edge: Edge, elements: &[T]) -> &mut [T] {
        let slice = self.slice(edge, elements.len());
        slice.copy_from_slice(elements);
        slice
    }

    /// Nothing was written beside the slice of `len` elements. Makes it untouched again.
    pub fn check_rest<T>(&mut self, edge: Edge, len: usize) {
        let place = self.place::<T>(edge, len);
        // SAFETY: all between the guard pages.
        let inner = unsafe {
            std::slice::from_raw_parts_mut(self.map.add(self.page), self.len - 2 * self.page)
        };
        let (start, end) = (place.start - self.page, place.end - self.page);
        for (at, &byte) in inner.iter().enumerate() {
            let inside = (start..end).contains(&at);
            assert!(
                inside || byte == UNTOUCHED,
                "byte {at} beside {start}..{end}"
            );
        }
        inner[start..end].fill(UNTOUCHED);
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the whole map, which nothing borrows any more.
        unsafe { libc::munmap(self.map.cast(), self.len) };
    }
}
