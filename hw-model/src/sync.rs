//! The one door to atomics, locks and threads, swapped as a whole for a model checker.
//!
//! Nothing else in the workspace imports `std::sync`, `parking_lot` or `std::sync::atomic`. `--cfg loom` swaps in loom
//! (the sequence core), `--cfg shuttle` swaps in shuttle (the whole protocol).

#[cfg(loom)]
pub use loom::sync::atomic::{self, fence};
// loom's own Arc cannot be a method receiver. Reference counts are not what the loom tests are about.
#[cfg(loom)]
pub use std::sync::{Arc, Weak};

#[cfg(shuttle)]
pub use shuttle::sync::{
    Arc, Weak,
    atomic::{self, fence},
};
#[cfg(not(any(loom, shuttle)))]
pub use std::sync::{
    Arc, Weak,
    atomic::{self, fence},
};

pub use std::sync::OnceLock;

/// For measurements, which no model checker sees.
#[cfg(not(any(loom, shuttle)))]
pub use std::sync::Barrier;

/// Threads of whoever runs the program.
#[cfg(not(any(loom, shuttle)))]
pub mod thread {
    pub use std::thread::{Builder, JoinHandle, park_timeout, scope, sleep, spawn, yield_now};
}

/// Counts that tests keep over all executions of a model checker, which knows nothing of them.
#[cfg(any(loom, shuttle))]
pub mod outside {
    pub use std::sync::atomic::{AtomicUsize, Ordering};
}

/// Threads of the model checker; time does not pass there, so a sleep is a chance for the others.
#[cfg(any(loom, shuttle))]
pub mod thread {
    #[cfg(loom)]
    pub use loom::thread::{Builder, JoinHandle, spawn, yield_now};
    #[cfg(shuttle)]
    pub use shuttle::thread::{Builder, JoinHandle, spawn, yield_now};

    /// Lets the other threads run.
    pub fn sleep(_time: std::time::Duration) {
        yield_now();
    }
}

pub use lock::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[cfg(not(any(loom, shuttle)))]
mod lock {
    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
}

/// `count` zeroed words straight from the allocator, so that parts never written are never touched; `None` if the host
/// has no memory for them.
#[cfg(not(any(loom, shuttle)))]
#[must_use]
pub fn zeroed_words(count: usize) -> Option<Box<[atomic::AtomicU64]>> {
    <[atomic::AtomicU64] as zerocopy::FromZeros>::new_box_zeroed_with_elems(count).ok()
}

/// `count` zeroed words.
#[cfg(any(loom, shuttle))]
#[must_use]
pub fn zeroed_words(count: usize) -> Option<Box<[atomic::AtomicU64]>> {
    Some((0..count).map(|_| atomic::AtomicU64::new(0)).collect())
}

/// Locks with the face of `parking_lot` over those of a model checker.
#[cfg(any(loom, shuttle))]
mod lock {
    #[cfg(loom)]
    use loom::sync as inner;
    #[cfg(shuttle)]
    use shuttle::sync as inner;
    use std::ops::{Deref, DerefMut};
    use std::sync::PoisonError;
    use std::time::Duration;

    pub use inner::{RwLockReadGuard, RwLockWriteGuard};

    /// A mutex without poison, as `parking_lot`'s is.
    #[derive(Debug)]
    pub struct Mutex<T>(inner::Mutex<T>);

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl<T> Mutex<T> {
        /// As `parking_lot::Mutex::new`.
        pub fn new(value: T) -> Self {
            Self(inner::Mutex::new(value))
        }
        /// As `parking_lot::Mutex::lock`.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard { lock: self, inner: Some(self.lock_inner()) }
        }
        /// As `parking_lot::Mutex::try_lock`.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok().map(|inner| MutexGuard { lock: self, inner: Some(inner) })
        }
        fn lock_inner(&self) -> inner::MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    /// A locked [`Mutex`].
    #[derive(Debug)]
    pub struct MutexGuard<'a, T> {
        lock: &'a Mutex<T>,
        /// Empty only inside [`Condvar::wait_for`].
        inner: Option<inner::MutexGuard<'a, T>>,
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.inner.as_ref().expect("the lock is held")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.inner.as_mut().expect("the lock is held")
        }
    }

    /// A reader-writer lock whose poison is a panic.
    #[derive(Debug)]
    pub struct RwLock<T>(inner::RwLock<T>);

    impl<T: Default> Default for RwLock<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl<T> RwLock<T> {
        /// As `parking_lot::RwLock::new`.
        pub fn new(value: T) -> Self {
            Self(inner::RwLock::new(value))
        }
        /// As `parking_lot::RwLock::read`.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().expect("a thread panicked while it held this lock")
        }
        /// As `parking_lot::RwLock::try_read`.
        pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
            self.0.try_read().ok()
        }
        /// As `parking_lot::RwLock::write`.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().expect("a thread panicked while it held this lock")
        }
    }

    /// A condition variable; under a model checker a timed wait is a wait that may end at once.
    #[derive(Debug, Default)]
    pub struct Condvar(inner::Condvar);

    impl Condvar {
        /// As `parking_lot::Condvar::new`.
        pub fn new() -> Self {
            Self(inner::Condvar::new())
        }
        /// As `parking_lot::Condvar::notify_all`.
        pub fn notify_all(&self) {
            self.0.notify_all();
        }
        /// As `parking_lot::Condvar::notify_one`.
        pub fn notify_one(&self) {
            self.0.notify_one();
        }
        /// Gives the lock up for a moment and takes it again. Callers loop over their condition.
        pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _timeout: Duration) {
            guard.inner = None;
            super::thread::yield_now();
            guard.inner = Some(guard.lock.lock_inner());
        }
    }
}
