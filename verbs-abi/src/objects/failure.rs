//! What libibverbs would say to the errors of the house.

use crate::errno::Errno;
use hw_model::hca::{
    AllocDeviceMemoryError, CreateAhError, CreateChannelError, CreateCqError, CreateKeyError,
    CreateNullKeyError, CreateQpError, CreateSrqError, ModifyQpError, MulticastError, OpenDomainError,
    OpenQpError, PdError, RegisterDeviceMemoryError, ResizeCqError,
};
use mr::device::{AdviseError, RegisterError, ReregError};
use mr::{MapRegionError, PublishError};
use odp::fault::FaultFailure;
use odp::space::PinError;
use odp::space::dmabuf::AttachError;
use odp::space::process::FileExportError;

/// Leaves what an error number cannot say in the log, and gives the number.
fn said(error: &dyn std::error::Error, number: Errno) -> Errno {
    tracing::debug!(%error, errno = number.0, "refused");
    number
}

impl From<PdError> for Errno {
    fn from(error: PdError) -> Self {
        said(
            &error,
            match error {
                PdError::InUse { .. } => Self::BUSY,
                PdError::TooMany { .. } => Self::NOMEM,
                PdError::Unknown { .. } => Self::INVAL,
            },
        )
    }
}

impl From<CreateKeyError> for Errno {
    fn from(error: CreateKeyError) -> Self {
        said(
            &error,
            match error {
                CreateKeyError::TooMany { .. } => Self::NOMEM,
                _ => Self::INVAL,
            },
        )
    }
}

impl From<RegisterError> for Errno {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::Key(error) => error.into(),
            RegisterError::Map(error) => error.into(),
            RegisterError::ImplicitAddress { .. }
            | RegisterError::ImplicitHugetlb
            | RegisterError::ImplicitInSteps
            | RegisterError::NotPinned { .. } => said(&error, Self::INVAL),
        }
    }
}

impl From<ReregError> for Errno {
    fn from(error: ReregError) -> Self {
        match error {
            ReregError::Map(error) => error.into(),
            ReregError::Unsupported => said(&error, Self::NOTSUPP),
            ReregError::UnderWay => said(&error, Self::BUSY),
            ReregError::Key(_) | ReregError::ForeignPd | ReregError::Deregistered => {
                said(&error, Self::INVAL)
            }
        }
    }
}

impl From<FileExportError> for Errno {
    fn from(error: FileExportError) -> Self {
        let number = match error {
            FileExportError::NotMappable { reason } if reason == rustix::io::Errno::BADF => Self::BADF,
            // What dma_buf_get says to a descriptor that is none.
            _ => Self::INVAL,
        };
        said(&error, number)
    }
}

impl From<AttachError> for Errno {
    fn from(error: AttachError) -> Self {
        said(
            &error,
            match error {
                AttachError::OutOfMemory => Self::NOMEM,
                _ => Self::INVAL,
            },
        )
    }
}

impl From<MapRegionError> for Errno {
    fn from(error: MapRegionError) -> Self {
        said(
            &error,
            match error {
                MapRegionError::Empty | MapRegionError::NotHuge { .. } | MapRegionError::Closing => {
                    Self::INVAL
                }
                MapRegionError::TooLong { .. }
                | MapRegionError::PageList(_)
                | MapRegionError::NoHugeIova { .. }
                | MapRegionError::Iova(_)
                | MapRegionError::Pin(PinError::MemlockLimit { .. }) => Self::NOMEM,
                MapRegionError::Watch(_) | MapRegionError::Pin(_) => Self::FAULT,
                MapRegionError::Pages(error) => error.into(),
            },
        )
    }
}

impl From<FaultFailure<PublishError>> for Errno {
    fn from(error: FaultFailure<PublishError>) -> Self {
        // ib_umem_get and hmm_range_fault say EFAULT for memory that is not there, or not writable as asked.
        said(&error, Self::FAULT)
    }
}

impl From<AdviseError> for Errno {
    fn from(error: AdviseError) -> Self {
        match error {
            AdviseError::OutOfRange { .. } => said(&error, Self::FAULT),
            AdviseError::NotWritable | AdviseError::OtherPd { .. } => said(&error, Self::PERM),
            AdviseError::UnknownKey { .. } => said(&error, Self::NOENT),
            AdviseError::Deregistered
            | AdviseError::Nothing
            | AdviseError::NotARegion { .. }
            | AdviseError::NotOnDemand { .. } => said(&error, Self::INVAL),
            AdviseError::Refused { errno, .. } => said(&error, Self(errno)),
            AdviseError::Part(error) => error.into(),
            AdviseError::Pages(error) => error.into(),
        }
    }
}

impl From<CreateCqError> for Errno {
    fn from(error: CreateCqError) -> Self {
        said(
            &error,
            match error {
                CreateCqError::TooMany { .. } => Self::NOMEM,
                _ => Self::INVAL,
            },
        )
    }
}

impl From<ResizeCqError> for Errno {
    fn from(error: ResizeCqError) -> Self {
        said(
            &error,
            match error {
                ResizeCqError::NoMemory { .. } => Self::NOMEM,
                _ => Self::INVAL,
            },
        )
    }
}

impl From<CreateChannelError> for Errno {
    fn from(error: CreateChannelError) -> Self {
        said(&error, Self::NOMEM)
    }
}

impl From<CreateQpError> for Errno {
    fn from(error: CreateQpError) -> Self {
        said(
            &error,
            match error {
                CreateQpError::TooMany { .. } => Self::NOMEM,
                _ => Self::INVAL,
            },
        )
    }
}

impl From<CreateSrqError> for Errno {
    fn from(error: CreateSrqError) -> Self {
        said(
            &error,
            match error {
                CreateSrqError::TooMany { .. } => Self::NOMEM,
                _ => Self::INVAL,
            },
        )
    }
}

impl From<OpenDomainError> for Errno {
    fn from(error: OpenDomainError) -> Self {
        match error {
            OpenDomainError::Pd(error) => error.into(),
            OpenDomainError::Cq(error) => error.into(),
        }
    }
}

impl From<OpenQpError> for Errno {
    fn from(error: OpenQpError) -> Self {
        said(&error, Self::INVAL)
    }
}

impl From<MulticastError> for Errno {
    fn from(error: MulticastError) -> Self {
        said(
            &error,
            match &error {
                MulticastError::TooMany => Self::NOMEM,
                MulticastError::Link { source, .. } => source.raw_os_error().map_or(Self::NOTSUPP, Self),
                _ => Self::INVAL,
            },
        )
    }
}

impl From<ModifyQpError> for Errno {
    fn from(error: ModifyQpError) -> Self {
        said(&error, Self::INVAL)
    }
}

impl From<CreateAhError> for Errno {
    fn from(error: CreateAhError) -> Self {
        said(
            &error,
            match error {
                CreateAhError::TooMany { .. } => Self::NOMEM,
                _ => Self::INVAL,
            },
        )
    }
}

impl From<AllocDeviceMemoryError> for Errno {
    fn from(error: AllocDeviceMemoryError) -> Self {
        said(
            &error,
            match error {
                AllocDeviceMemoryError::Alignment { .. } => Self::INVAL,
                _ => Self::NOMEM,
            },
        )
    }
}

impl From<RegisterDeviceMemoryError> for Errno {
    fn from(error: RegisterDeviceMemoryError) -> Self {
        said(&error, Self::INVAL)
    }
}

impl From<CreateNullKeyError> for Errno {
    fn from(error: CreateNullKeyError) -> Self {
        said(&error, Self::NOMEM)
    }
}
