//! Which way DMA takes to a page: one total, disjoint table.
//!
//! Every caller that maps anything asks here and nowhere else. The rows are tried against every combination of inputs in
//! the tests: exactly one row answers each.

use hw_model::bus::PeerRoute;
use hw_model::hca::{Backing, Path};

/// What is to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Host memory, in the clear or shared by an encrypted guest.
    Ram,
    /// Host memory of an encrypted guest that devices cannot read.
    EncryptedRam,
    /// A BAR, with what the topology says of the way from this device to its provider.
    Peer(PeerRoute),
    /// Memory of a device that only that device can reach.
    DevicePrivate,
}

impl Target {
    /// What a page of `backing` is to a device, given the topology's answer for its provider if it has one.
    ///
    /// A page that says it is in a BAR but names no provider is treated as one no peer can reach.
    #[must_use]
    pub fn of(backing: Backing, provider: Option<PeerRoute>) -> Self {
        match backing {
            Backing::Anonymous
            | Backing::TransparentHuge
            | Backing::Hugetlb
            | Backing::File
            | Backing::Shared
            | Backing::Zero
            | Backing::DmabufSystem
            | Backing::EncryptedShared => Self::Ram,
            Backing::EncryptedPrivate => Self::EncryptedRam,
            Backing::DmabufPeer | Backing::DeviceCoherent => {
                Self::Peer(provider.unwrap_or(PeerRoute::NotSupported))
            }
            Backing::DevicePrivate => Self::DevicePrivate,
        }
    }
}

/// How the device's DMA is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Translation {
    /// Behind an IOMMU that translates.
    Iommu,
    /// No IOMMU, or one that passes this device through.
    Direct,
}

/// Whether one-sided DMA must see memory as the CPU does at every moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Policy {
    /// As kernels since about 7.0: what would need a copy or a cache flush is refused by name.
    #[default]
    Coherent,
    /// As before: bounce, and let the user call sync.
    Legacy,
}

/// One question to the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// What is to be reached.
    pub target: Target,
    /// How the device's DMA is translated.
    pub translation: Translation,
    /// Whether the device's DMA is coherent with CPU caches.
    pub coherent_device: bool,
    /// Whether the device is trusted. One that is not must not see bytes beside the buffer.
    pub trusted_device: bool,
    /// Whether the physical range is within the device's DMA mask. Only matters without an IOMMU.
    pub within_mask: bool,
    /// Whether the range starts and ends on granules of the IOMMU.
    pub granule_aligned: bool,
    /// What is asked of coherence.
    pub policy: Policy,
}

/// Why a page cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// Device-private memory has no bus address at all.
    #[error("device-private memory must be migrated to system memory first")]
    DevicePrivate,
    /// The device cannot decrypt it.
    #[error("private memory of an encrypted guest; hand over shared memory as a DMABUF instead")]
    Encrypted,
    /// The topology forbids the way.
    #[error("no peer-to-peer path from this device to the memory's provider")]
    PeerUnreachable,
    /// MMIO cannot be bounced.
    #[error("a BAR range that the device cannot reach directly, and MMIO cannot be bounced")]
    BounceOfMmio,
    /// A bounce buffer would break coherence.
    #[error("the range would need a bounce buffer, which one-sided DMA cannot be kept coherent with")]
    WouldBounce,
    /// Caches would have to be flushed at points that one-sided DMA does not have.
    #[error("the device is not coherent with CPU caches")]
    NonCoherent,
}

/// A row of the table.
pub struct Row {
    /// Its name, as in reports.
    pub name: &'static str,
    /// What it answers.
    pub answer: Result<Path, Refusal>,
    /// Why, in a paragraph.
    pub why: &'static str,
    /// Where the kernel has this rule.
    pub source: &'static str,
    matches: fn(&Case) -> bool,
}

impl Case {
    fn peer(&self, route: PeerRoute) -> bool {
        self.target == Target::Peer(route)
    }
    fn translated(&self) -> bool {
        self.translation == Translation::Iommu
    }
    /// Whether the device cannot use the range where it is: bytes beside it would show to an untrusted device, or it is
    /// beyond the mask of a device that nothing translates for.
    fn needs_bounce(&self) -> bool {
        match self.translation {
            Translation::Iommu => !self.trusted_device && !self.granule_aligned,
            Translation::Direct => !self.within_mask,
        }
    }
    fn needs_cache_maintenance(&self) -> bool {
        !self.coherent_device && self.policy == Policy::Coherent
    }
}

/// The table. Rows are disjoint, so their order means nothing.
pub const TABLE: [Row; 15] = [
    Row {
        name: "device-private",
        answer: Err(Refusal::DevicePrivate),
        why: "Memory that only its own device can address. A fault migrates it back before it gets here; a page that \
              still is private cannot be mapped for another device.",
        source: "mm/hmm.c hmm_vma_handle_pte",
        matches: |c| c.target == Target::DevicePrivate,
    },
    Row {
        name: "encrypted, coherent",
        answer: Err(Refusal::Encrypted),
        why: "A device reads ciphertext from private memory, so every DMA would have to go through shared bounce \
              buffers, and one-sided access has no point at which to copy.",
        source: "kernel/dma/direct.h dma_direct_map_phys with DMA_ATTR_REQUIRE_COHERENT",
        matches: |c| c.target == Target::EncryptedRam && c.policy == Policy::Coherent,
    },
    Row {
        name: "encrypted, legacy",
        answer: Ok(Path::Bounce),
        why: "The whole range is bounced through shared memory; the user says when to copy.",
        source: "kernel/dma/swiotlb.c, force_dma_unencrypted",
        matches: |c| c.target == Target::EncryptedRam && c.policy == Policy::Legacy,
    },
    Row {
        name: "peer, not supported",
        answer: Err(Refusal::PeerUnreachable),
        why: "The host bridge between the two is not known to forward peer requests.",
        source: "drivers/pci/p2pdma.c calc_map_type_and_dist",
        matches: |c| c.peer(PeerRoute::NotSupported),
    },
    Row {
        name: "peer, bus address",
        answer: Ok(Path::BusAddress),
        why: "Both are below one switch that does not redirect upstream: the switch routes by the BAR's own address, \
              the IOMMU never sees the request, and the page's IOVA slot stays a hole.",
        source: "drivers/pci/p2pdma.c PCI_P2PDMA_MAP_BUS_ADDR; mm/hmm.c hmm_dma_map_pfn",
        matches: |c| c.peer(PeerRoute::BusAddress),
    },
    Row {
        name: "peer, host bridge, IOMMU",
        answer: Ok(Path::HostBridge),
        why: "The request climbs to the host bridge, so the IOMMU translates it: the BAR is linked as MMIO.",
        source: "drivers/iommu/dma-iommu.c dma_iova_link with DMA_ATTR_MMIO",
        matches: |c| c.peer(PeerRoute::HostBridge) && c.translated() && !c.needs_bounce(),
    },
    Row {
        name: "peer, host bridge, direct",
        answer: Ok(Path::Direct),
        why: "Nothing translates for this device: it uses the BAR's host physical address.",
        source: "kernel/dma/direct.c dma_direct_map_resource",
        matches: |c| c.peer(PeerRoute::HostBridge) && !c.translated() && !c.needs_bounce(),
    },
    Row {
        name: "peer, would bounce",
        answer: Err(Refusal::BounceOfMmio),
        why: "The range starts or ends inside a granule before an untrusted device, or lies beyond the DMA mask. RAM \
              would be bounced; a BAR cannot be.",
        source: "drivers/iommu/dma-iommu.c iommu_dma_iova_link_swiotlb: DMA_ATTR_MMIO refused",
        matches: |c| c.peer(PeerRoute::HostBridge) && c.needs_bounce(),
    },
    Row {
        name: "RAM, would bounce, coherent",
        answer: Err(Refusal::WouldBounce),
        why: "A bounce buffer is a second copy that only explicit sync calls bring together; one-sided access makes \
              none.",
        source: "drivers/iommu/dma-iommu.c dma_iova_link with DMA_ATTR_REQUIRE_COHERENT",
        matches: |c| c.target == Target::Ram && c.needs_bounce() && c.policy == Policy::Coherent,
    },
    Row {
        name: "RAM, would bounce, legacy",
        answer: Ok(Path::Bounce),
        why: "Head and tail granules are bounced, the aligned middle is direct; the user says when to copy.",
        source: "drivers/iommu/dma-iommu.c iommu_dma_iova_link_swiotlb; kernel/dma/swiotlb.c",
        matches: |c| c.target == Target::Ram && c.needs_bounce() && c.policy == Policy::Legacy,
    },
    Row {
        name: "RAM, non-coherent device",
        answer: Err(Refusal::NonCoherent),
        why: "Caches would have to be cleaned and invalidated around every remote access.",
        source: "drivers/iommu/dma-iommu.c dma_iova_link: dev_is_dma_coherent with DMA_ATTR_REQUIRE_COHERENT",
        matches: |c| c.target == Target::Ram && !c.needs_bounce() && c.needs_cache_maintenance(),
    },
    Row {
        name: "RAM, IOMMU, trusted",
        answer: Ok(Path::Iova),
        why: "The ordinary page of the ordinary caller: linked in the IOVA range.",
        source: "drivers/iommu/dma-iommu.c __dma_iova_link",
        matches: |c| {
            let plain = c.target == Target::Ram && !c.needs_bounce() && !c.needs_cache_maintenance();
            plain && c.translated() && c.trusted_device
        },
    },
    Row {
        name: "RAM, IOMMU, untrusted, whole granules",
        answer: Ok(Path::Iova),
        why: "Whole granules show an untrusted device nothing but the buffer.",
        source: "drivers/iommu/dma-iommu.c dev_use_swiotlb",
        matches: |c| {
            let plain = c.target == Target::Ram && !c.needs_bounce() && !c.needs_cache_maintenance();
            plain && c.translated() && !c.trusted_device
        },
    },
    Row {
        name: "RAM, direct, coherent",
        answer: Ok(Path::Direct),
        why: "Nothing is reserved and nothing is stored: the DMA address is the physical address.",
        source: "kernel/dma/direct.h dma_direct_map_phys",
        matches: |c| c.target == Target::Ram && !c.needs_bounce() && !c.translated() && c.coherent_device,
    },
    Row {
        name: "RAM, direct, non-coherent, legacy",
        answer: Ok(Path::Direct),
        why: "The DMA address is the physical address; the user's sync calls maintain the caches.",
        source: "kernel/dma/direct.h dma_direct_sync_single_for_device",
        matches: |c| {
            let plain = c.target == Target::Ram && !c.needs_bounce() && !c.translated();
            plain && !c.coherent_device && c.policy == Policy::Legacy
        },
    },
];

/// The row that answers `case`.
#[must_use]
pub fn row(case: &Case) -> &'static Row {
    TABLE.iter().find(|row| (row.matches)(case)).expect("the table is total")
}

/// The path for `case`.
///
/// # Errors
/// The reason for which no path exists.
pub fn route(case: &Case) -> Result<Path, Refusal> {
    row(case).answer
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    fn every_case() -> Vec<Case> {
        let mut cases = Vec::new();
        let targets = [
            Target::Ram,
            Target::EncryptedRam,
            Target::Peer(PeerRoute::BusAddress),
            Target::Peer(PeerRoute::HostBridge),
            Target::Peer(PeerRoute::NotSupported),
            Target::DevicePrivate,
        ];
        for target in targets {
            for translation in [Translation::Iommu, Translation::Direct] {
                for policy in [Policy::Coherent, Policy::Legacy] {
                    for bits in 0..16_u8 {
                        cases.push(Case {
                            target,
                            translation,
                            policy,
                            coherent_device: bits & 1 != 0,
                            trusted_device: bits & 2 != 0,
                            within_mask: bits & 4 != 0,
                            granule_aligned: bits & 8 != 0,
                        });
                    }
                }
            }
        }
        cases
    }

    #[test]
    fn exactly_one_row_answers_every_case() {
        for case in every_case() {
            let rows: Vec<_> = TABLE.iter().filter(|row| (row.matches)(&case)).map(|row| row.name).collect();
            assert_eq!(rows.len(), 1, "{case:?} is answered by {rows:?}");
        }
    }

    #[test]
    fn every_row_answers_some_case() {
        let cases = every_case();
        for row in &TABLE {
            assert!(cases.iter().any(row.matches), "row '{}' can never be reached", row.name);
        }
    }

    #[test]
    fn where_coherence_is_required_nothing_bounces() {
        for case in every_case().iter().filter(|case| case.policy == Policy::Coherent) {
            assert_ne!(route(case), Ok(Path::Bounce), "{case:?}");
        }
    }

    #[test]
    fn only_translated_devices_get_linked_paths_and_only_peers_get_bus_addresses() {
        for case in every_case() {
            match route(&case) {
                Ok(Path::Iova | Path::HostBridge) => {
                    assert_eq!(case.translation, Translation::Iommu, "{case:?}")
                }
                Ok(Path::Direct) => assert_eq!(case.translation, Translation::Direct, "{case:?}"),
                Ok(Path::BusAddress) => assert!(matches!(case.target, Target::Peer(_)), "{case:?}"),
                Ok(Path::Bounce) | Err(_) => {}
            }
        }
    }
}
