//! A device with two ends connected to each other, and what is read and written through them.
//!
//! Unsafe island. Invariant: what is vouched for lives longer than what is made of it: each case drops its own before it ends.
#![allow(unsafe_code)]

use hw_model::addr::{RegionAddr, VirtAddr, VirtRange};
use hw_model::hca::{Completion, Key, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::device::verbs::{VerbsCq, VerbsDevice, VerbsPd, VerbsQp, VerbsRegion};
use mr::{Region, RegisterOptions};
use odp::space::UserRange;
use odp::space::process::{ContiguousMemory, Options, OwnedMemory, ProcessSpace};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A request that takes longer never ends.
const PATIENCE: Duration = Duration::from_secs(60);
pub const PAGE: u64 = 4096;

#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub run: fn(&World) -> Result<(), Error>,
}

pub struct World {
    pub device: Arc<VerbsDevice>,
    pub pd: Arc<VerbsPd>,
    pub space: Arc<ProcessSpace>,
    /// A page of the requester's.
    here: Arc<OwnedMemory>,
    into: Arc<VerbsRegion>,
}

/// Two connected queue pairs; requests go from the one to the other.
pub struct Pair {
    pub requester: Arc<VerbsQp>,
    pub responder: Arc<VerbsQp>,
    cq: Arc<VerbsCq>,
}

impl Pair {
    pub fn new(
        device: &Arc<VerbsDevice>,
        requester: &Arc<VerbsPd>,
        responder: &Arc<VerbsPd>,
    ) -> Result<Self, Error> {
        let cq = device.create_cq(16)?;
        let (requester, responder) = (requester.create_qp(&cq, 8)?, responder.create_qp(&cq, 8)?);
        requester.connect(responder.endpoint())?;
        responder.connect(requester.endpoint())?;
        Ok(Self { requester, responder, cq })
    }

    /// A page of what `remote` names, into a page of the requester's.
    pub fn read_remote(&self, into: &dyn Region, remote: Remote) -> Result<(), Error> {
        let local = [Sge { key: into.key(), address: into.address(), length: PAGE as u32 }];
        self.requester.post_send(&SendRequest::read(1, &local, remote))?;
        let status = self.completion()?.status;
        ensure(status == Status::Success, &format!("{status:?}"))
    }

    /// The first page of a region.
    pub fn read(&self, into: &dyn Region, from: &dyn Region) -> Result<(), Error> {
        self.read_remote(into, Remote { key: from.key(), address: from.address() })
    }

    /// The next completion of either.
    pub fn completion(&self) -> Result<Completion, Error> {
        let (start, mut found) = (Instant::now(), Vec::new());
        while self.cq.poll(&mut found, 1)? == 0 {
            if start.elapsed() > PATIENCE {
                return Err("a posted request never ended".into());
            }
            std::thread::yield_now();
        }
        Ok(found.remove(0))
    }
}

impl World {
    pub fn open(device: &str) -> Result<Self, Error> {
        let device = VerbsDevice::open(device)?;
        let pd = device.alloc_pd()?;
        let space = ProcessSpace::open(Options::default())?;
        let here = Arc::new(OwnedMemory::new(&space, PAGE)?);
        let into = pd.register(&here.user_range(), RegisterOptions::pinned())?;
        Ok(Self { device, pd, space, here, into })
    }

    /// Gives everything back, and says if something else still holds the device.
    pub fn close(self) -> Result<(), Error> {
        let Self { device, pd, into, .. } = self;
        drop(into);
        drop(pd);
        let holders = Arc::strong_count(&device) - 1;
        if holders > 0 { Err(format!("{holders} objects still hold the device").into()) } else { Ok(()) }
    }

    /// How a mixture is registered: on demand if that is there.
    pub fn best(&self) -> RegisterOptions {
        let has = self.device.capabilities().has(mr::device::verbs::Capability::OnDemand);
        if has { RegisterOptions::on_demand() } else { RegisterOptions::pinned() }
    }

    pub fn pair(&self) -> Result<Pair, Error> {
        Pair::new(&self.device, &self.pd, &self.pd)
    }

    fn local(&self) -> [Sge; 1] {
        [Sge { key: self.into.key(), address: self.into.address(), length: PAGE as u32 }]
    }

    /// A page, read through `pair`.
    pub fn read_by(&self, pair: &Pair, key: Key, address: RegionAddr) -> Result<(Status, Vec<u8>), Error> {
        // Nobody takes for an answer what was there before.
        self.here.write_at(0, &[0xee; PAGE as usize])?;
        pair.requester.post_send(&SendRequest::read(1, &self.local(), Remote { key, address }))?;
        let status = pair.completion()?.status;
        let mut bytes = vec![0; PAGE as usize];
        self.here.read_at(0, &mut bytes)?;
        Ok((status, bytes))
    }

    /// A page, read through two new queue pairs: one that failed is of no use any more.
    pub fn read(&self, key: Key, address: RegionAddr) -> Result<(Status, Vec<u8>), Error> {
        self.read_by(&self.pair()?, key, address)
    }

    /// A page of `byte`, written through two new queue pairs.
    pub fn write(&self, key: Key, address: RegionAddr, byte: u8) -> Result<Status, Error> {
        self.here.write_at(0, &[byte; PAGE as usize])?;
        let pair = self.pair()?;
        pair.requester.post_send(&SendRequest::write(1, &self.local(), Remote { key, address }))?;
        Ok(pair.completion()?.status)
    }

    /// That a page of `byte` is read there.
    pub fn expect(&self, what: &str, key: Key, address: RegionAddr, byte: u8) -> Result<(), Error> {
        let (status, bytes) = self.read(key, address)?;
        let right = bytes.iter().all(|read| *read == byte);
        if status != Status::Success || !right {
            return Err(format!("{what}: {status:?}, {:#x} where {byte:#x} is", bytes[0]).into());
        }
        Ok(())
    }

    /// That the key reaches nothing there.
    pub fn expect_refused(&self, what: &str, key: Key, address: RegionAddr) -> Result<(), Error> {
        let (status, bytes) = self.read(key, address)?;
        if status != Status::RemoteAccessError || bytes.iter().any(|byte| *byte != 0xee) {
            return Err(format!("{what}: {status:?}, and {:#x} was read", bytes[0]).into());
        }
        Ok(())
    }
}

pub fn ensure(holds: bool, what: &str) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(what.to_owned().into()) }
}

/// A domain of the crate `ibverbs` that is lent, for as long as the case runs.
pub fn borrowed(
    context: &ibverbs::Context,
    domain: &ibverbs::ProtectionDomain<'_>,
    keep: Arc<dyn std::any::Any + Send + Sync>,
) -> Result<Arc<VerbsPd>, Error> {
    // SAFETY: the only case that lends one drops it before the domain.
    Ok(unsafe { VerbsPd::from_borrowed_ibverbs(context, domain, keep) }?)
}

/// All memory of this process.
pub fn everything(space: &Arc<ProcessSpace>) -> UserRange {
    // SAFETY: requests of these cases name memory of these cases only, of which nobody has a reference.
    unsafe { UserRange::everything(Arc::clone(space) as _) }
}

/// A page of the address space that nothing is mapped at.
pub fn nothing(space: &Arc<ProcessSpace>) -> UserRange {
    // The kernel maps nothing in the first page (vm.mmap_min_addr).
    everything(space).part(0, PAGE).expect("the first page")
}

/// Gives memory that [`mapped`] made to `memory`, at `offset`.
pub fn give(memory: &ContiguousMemory, offset: u64, page: VirtRange) -> Result<(), Error> {
    // SAFETY: it was mapped for this, and nobody refers to it.
    Ok(unsafe { memory.take(offset, page) }?)
}

/// A page of `byte`, mapped by itself, of which nobody knows.
pub fn mapped(byte: u8) -> Result<VirtRange, Error> {
    let (read, write) = (rustix::mm::ProtFlags::READ, rustix::mm::ProtFlags::WRITE);
    let private = rustix::mm::MapFlags::PRIVATE;
    let at = std::ptr::null_mut();
    // SAFETY: a new private mapping at an address that the kernel chooses replaces nothing.
    let at = unsafe { rustix::mm::mmap_anonymous(at, PAGE as usize, read | write, private) }?;
    let range = VirtRange::new(VirtAddr(at as u64), PAGE).ok_or("in the address space")?;
    // SAFETY: our own mapping, of so many bytes.
    unsafe { at.cast::<u8>().write_bytes(byte, PAGE as usize) };
    Ok(range)
}

/// The first `pages` pages of a memory file that is sealed against shrinking, as a DMABUF of the kernel's; `None` if it has no
/// /dev/udmabuf (drivers/dma-buf/udmabuf.c).
pub fn udmabuf(file: &OwnedFd, pages: u64) -> Result<Option<OwnedFd>, Error> {
    /// `UDMABUF_CREATE` of linux/udmabuf.h, and what it is given.
    const CREATE: libc::Ioctl = 0x4018_7542;
    #[repr(C)]
    struct Create {
        memfd: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    let Ok(maker) = std::fs::File::options().read(true).write(true).open("/dev/udmabuf") else {
        return Ok(None);
    };
    let create = Create { memfd: file.as_raw_fd().cast_unsigned(), flags: 0, offset: 0, size: pages * PAGE };
    // SAFETY: the driver reads the struct and gives a descriptor.
    let made = unsafe { libc::ioctl(maker.as_raw_fd(), CREATE, &raw const create) };
    if made < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: made just now, and ours.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(made) }))
}
