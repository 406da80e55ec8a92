//! A driver for NVMe controllers, polled, in user space: one admin queue pair and one for input and output, over VFIO.
//!
//! Its queues lie in memory that is linked as any other, and what commands point to is whatever the caller linked. Source:
//! NVM Express Base Specification 2.0, sections 3.1 (registers), 3.5 (initialization), 4 (queues and entries), 5 (admin
//! commands); NVM Command Set Specification 1.0 (read and write).

mod queue;

use hw_model::addr::{DmaAddr, PAGE_SIZE, pages_for};
use hw_model::iommu::LeafSize;
use hw_model::sync::Arc;
use mr::dma::vfio::{Bar, DeviceError, PciAddress, VfioContainer, VfioDevice};
use mr::dma::{DmaConfig, DmaDevice, IovaError, LinkError, Mapping};
use odp::space::process::{OwnedError, OwnedMemory, ProcessSpace};
use queue::Queue;
use std::time::{Duration, Instant};

/// Registers (figure "Property Definition").
mod register {
    pub const CAPABILITIES: u64 = 0x00;
    pub const CONFIGURATION: u64 = 0x14;
    pub const STATUS: u64 = 0x1c;
    pub const ADMIN_QUEUES: u64 = 0x24;
    pub const ADMIN_SUBMISSION: u64 = 0x28;
    pub const ADMIN_COMPLETION: u64 = 0x30;
}

/// Entries of 64 and 16 bytes, pages of 4 KiB, enabled.
const ENABLED: u32 = 6 << 16 | 4 << 20 | 1;
const READY: u32 = 1;
const FATAL: u32 = 1 << 1;
/// Entries of every queue.
const DEPTH: u16 = 16;
/// Pages that one queue pair takes: one of commands, one of completions.
const PAGES_A_PAIR: u64 = 2;
/// How long a command may take before the controller is given up.
const PATIENCE: Duration = Duration::from_secs(20);
/// The only name space that is used.
const NAMESPACE: u32 = 1;

/// Why the controller could not do something.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// VFIO refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No memory for the queues.
    #[error(transparent)]
    Memory(#[from] OwnedError),
    /// No addresses for the queues.
    #[error(transparent)]
    Iova(#[from] IovaError),
    /// The queues could not be linked.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The controller did not do in time what it has to.
    #[error("the controller {what} for {} s", PATIENCE.as_secs())]
    Stuck {
        /// What it did.
        what: &'static str,
    },
    /// A command ended with an error.
    #[error("command {opcode:#04x} ended with {status}")]
    Command {
        /// The command.
        opcode: u8,
        /// How it ended.
        status: Status,
    },
}

/// How a command ended (figure "Completion Queue Entry: Status Field").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Status code type: 0 is generic.
    pub kind: u8,
    /// Status code.
    pub code: u8,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match (self.kind, self.code) {
            (0, 0x00) => "success",
            (0, 0x02) => "invalid field in command",
            (0, 0x04) => "data transfer error",
            (0, 0x06) => "internal error",
            (0, 0x13) => "PRP offset invalid",
            (0, 0x80) => "LBA out of range",
            _ => "an error",
        };
        write!(f, "status {}:{:#04x}, {name}", self.kind, self.code)
    }
}

/// Where a command's data lies (figure "Common Command Format": DPTR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// PRP1 and PRP2.
    Prp(DmaAddr, DmaAddr),
    /// A descriptor of a scatter-gather list.
    Sgl([u8; 16]),
}

/// A read or write of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk to memory.
    Read,
    /// From memory to the disk.
    Write,
}

impl Direction {
    fn opcode(self) -> u8 {
        match self {
            Self::Write => 1,
            Self::Read => 2,
        }
    }
}

/// What the controller and its name space said of themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Model number.
    pub model: String,
    /// Whether input and output can be described by scatter-gather lists.
    pub sgl: bool,
    /// Most bytes of one command; `None` is unlimited.
    pub most_bytes: Option<u64>,
    /// Bytes of a block.
    pub block: u64,
    /// Blocks there are.
    pub blocks: u64,
}

/// A controller that runs.
pub struct Controller {
    // In this order they go: the controller stops before its queues are unlinked.
    bar: Bar,
    device: VfioDevice,
    admin: Queue,
    io: Queue,
    mapping: Mapping,
    /// Memory of the queues, and one page more for what Identify says.
    memory: OwnedMemory,
    identity: Identity,
}

impl Controller {
    /// Starts the controller at `address`, a device of `container`.
    ///
    /// # Errors
    /// See [`NvmeError`].
    pub fn start(
        container: &Arc<VfioContainer>,
        address: PciAddress,
        space: &Arc<ProcessSpace>,
    ) -> Result<Self, NvmeError> {
        let device = container.device(address)?;
        let bar = device.bar(0)?;
        device.set_bus_master(true)?;
        let dma = DmaDevice::over(Arc::clone(container) as _, DmaConfig::default());
        let memory = OwnedMemory::new(space, (2 * PAGES_A_PAIR + 1) * PAGE_SIZE)?;
        let mapping = Mapping::try_alloc(&dma, memory.size(), 0)?.expect("a container translates");
        mapping.link(0, memory.physical_base(), memory.size(), LeafSize::Page)?;
        mapping.sync(0, memory.size())?;
        let stride = 4 << (bar.read64(register::CAPABILITIES) >> 32 & 0xf);
        let admin = Queue::new(0, DEPTH, 0, stride);
        let io = Queue::new(1, DEPTH, PAGES_A_PAIR * PAGE_SIZE, stride);
        let identity = Identity { model: String::new(), sgl: false, most_bytes: None, block: 512, blocks: 0 };
        let mut controller = Self { bar, device, admin, io, mapping, memory, identity };
        controller.enable()?;
        controller.identify()?;
        controller.create_io_queues()?;
        Ok(controller)
    }

    /// What it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    fn wait_for(&self, mask: u32, value: u32, what: &'static str) -> Result<(), NvmeError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.bar.read32(register::STATUS);
            if status & mask == value {
                return Ok(());
            }
            if status & FATAL != 0 || Instant::now() > end {
                return Err(NvmeError::Stuck { what });
            }
            std::thread::yield_now();
        }
    }

    fn stop(&self) -> Result<(), NvmeError> {
        self.bar.write32(register::CONFIGURATION, 0);
        self.wait_for(READY, 0, "did not stop")
    }

    fn enable(&self) -> Result<(), NvmeError> {
        self.stop()?;
        let depth = u32::from(DEPTH) - 1;
        self.bar.write32(register::ADMIN_QUEUES, depth << 16 | depth);
        self.bar.write64(register::ADMIN_SUBMISSION, self.submission(&self.admin).0);
        self.bar.write64(register::ADMIN_COMPLETION, self.completion(&self.admin).0);
        self.bar.write32(register::CONFIGURATION, ENABLED);
        self.wait_for(READY, READY, "was not ready")
    }

    fn submission(&self, queue: &Queue) -> DmaAddr {
        self.mapping.dma_address(queue.offset)
    }
    fn completion(&self, queue: &Queue) -> DmaAddr {
        self.mapping.dma_address(queue.offset + PAGE_SIZE)
    }

    /// The page that Identify of this driver writes into.
    fn scratch(&self) -> u64 {
        2 * PAGES_A_PAIR * PAGE_SIZE
    }

    fn identify(&mut self) -> Result<(), NvmeError> {
        let data = self.mapping.dma_address(self.scratch());
        let mut page = [0; PAGE_SIZE as usize];
        self.admin_command(6, 0, Data::Prp(data, DmaAddr(0)), 1, 0)?;
        self.memory.read_at(self.scratch(), &mut page)?;
        let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("four bytes"));
        let model = String::from_utf8_lossy(&page[24..64]).trim().to_owned();
        // Maximum Data Transfer Size, in pages of 2^(12 + CAP.MPSMIN).
        let unit = PAGE_SIZE << (self.bar.read64(register::CAPABILITIES) >> 48 & 0xf);
        let most_bytes = (page[77] != 0).then(|| unit << page[77]);
        let sgl = word(536) & 3 != 0;
        self.admin_command(6, NAMESPACE, Data::Prp(data, DmaAddr(0)), 0, 0)?;
        self.memory.read_at(self.scratch(), &mut page)?;
        let blocks = u64::from_le_bytes(page[..8].try_into().expect("eight bytes"));
        let block = 1 << page[128 + usize::from(page[26] & 0xf) * 4 + 2];
        self.identity = Identity { model, sgl, most_bytes, block, blocks };
        Ok(())
    }

    fn create_io_queues(&mut self) -> Result<(), NvmeError> {
        let size = (u32::from(DEPTH) - 1) << 16 | 1;
        let completion = Data::Prp(self.completion(&self.io), DmaAddr(0));
        let submission = Data::Prp(self.submission(&self.io), DmaAddr(0));
        self.admin_command(5, 0, completion, size, 1)?;
        self.admin_command(1, 0, submission, size, 1 << 16 | 1)
    }

    fn admin_command(
        &mut self,
        opcode: u8,
        namespace: u32,
        data: Data,
        cdw10: u32,
        cdw11: u32,
    ) -> Result<(), NvmeError> {
        let entry = entry(opcode, namespace, data, [cdw10, cdw11, 0]);
        Self::run(&self.bar, &self.memory, &mut self.admin, entry)
    }

    /// Reads or writes `blocks` blocks from `first` on. The bytes are where `data` says; all of it must be linked and
    /// synced.
    ///
    /// # Errors
    /// [`NvmeError::Command`] if the controller ends it with an error, as it does when the IOMMU stops it.
    pub fn transfer(
        &mut self,
        direction: Direction,
        first: u64,
        blocks: u16,
        data: Data,
    ) -> Result<(), NvmeError> {
        let words = [first as u32, (first >> 32) as u32, u32::from(blocks) - 1];
        let entry = entry(direction.opcode(), NAMESPACE, data, words);
        Self::run(&self.bar, &self.memory, &mut self.io, entry)
    }

    /// Submits one command and waits for its end.
    fn run(bar: &Bar, memory: &OwnedMemory, queue: &mut Queue, entry: [u8; 64]) -> Result<(), NvmeError> {
        queue.submit(bar, memory, entry)?;
        let end = Instant::now() + PATIENCE;
        loop {
            match queue.complete(bar, memory)? {
                Some(Status { kind: 0, code: 0 }) => return Ok(()),
                Some(status) => return Err(NvmeError::Command { opcode: entry[0], status }),
                None if Instant::now() > end => {
                    return Err(NvmeError::Stuck { what: "did not end a command" });
                }
                None => std::thread::yield_now(),
            }
        }
    }
}

/// A command's 64 bytes.
fn entry(opcode: u8, namespace: u32, data: Data, [cdw10, cdw11, cdw12]: [u32; 3]) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[4..8].copy_from_slice(&namespace.to_le_bytes());
    match data {
        Data::Prp(first, second) => {
            entry[24..32].copy_from_slice(&first.0.to_le_bytes());
            entry[32..40].copy_from_slice(&second.0.to_le_bytes());
        }
        Data::Sgl(descriptor) => {
            // PSDT 01b: a scatter-gather list, metadata by address.
            entry[1] |= 1 << 6;
            entry[24..40].copy_from_slice(&descriptor);
        }
    }
    for (at, word) in [(40, cdw10), (44, cdw11), (48, cdw12)] {
        entry[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    entry
}

impl Drop for Controller {
    /// The controller stops, and only then the queues are unlinked.
    fn drop(&mut self) {
        if let Err(error) = self.stop().and_then(|()| Ok(self.device.set_bus_master(false)?)) {
            eprintln!("block_io: {error}; its queues stay linked");
            return;
        }
        let len = pages_for(self.memory.size()) * PAGE_SIZE;
        if let Err(error) = self.mapping.unlink(0, len) {
            eprintln!("block_io: {error}");
        }
    }
}
