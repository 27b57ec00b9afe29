//! Whom to believe: the authorities of a mesh, and what they have revoked.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor};
use webpki::{CertRevocationList, OwnedCertRevocationList};

/// Authorities and lists of revoked certificates. Empty, it believes nobody.
#[derive(Debug, Default)]
pub struct TrustBundle {
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    crls: Vec<CertRevocationList<'static>>,
    /// The lists as they were read, to tell another bundle from the same one.
    read: Vec<CertificateRevocationListDer<'static>>,
}

/// Why a bundle cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidBundle {
    /// There is not one certificate.
    #[error("there is no certificate")]
    Empty,
    /// Text is no PEM.
    #[error("the PEM cannot be read: {0}")]
    Pem(rustls::pki_types::pem::Error),
    /// A certificate cannot be an authority.
    #[error("certificate {index} is no authority: {reason}")]
    Root {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        reason: webpki::Error,
    },
    /// A list of revoked certificates cannot be read.
    #[error("revocation list {index} cannot be read: {reason}")]
    Crl {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        reason: webpki::Error,
    },
}

impl TrustBundle {
    /// Believes these authorities.
    ///
    /// # Errors
    /// When there is none, or one cannot be read: half of what was asked for is not taken.
    pub fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, InvalidBundle> {
        let roots: Vec<_> = roots.into_iter().collect();
        if roots.is_empty() {
            return Err(InvalidBundle::Empty);
        }
        let anchor = |(index, root): (usize, &CertificateDer<'static>)| {
            webpki::anchor_from_trusted_cert(root)
                .map(|anchor| anchor.to_owned())
                .map_err(|reason| InvalidBundle::Root { index, reason })
        };
        let anchors = roots.iter().enumerate().map(anchor).collect::<Result<_, _>>()?;
        Ok(Self { roots, anchors, crls: Vec::new(), read: Vec::new() })
    }

    /// Believes the authorities of a PEM text.
    ///
    /// # Errors
    /// When it is no PEM, or has no certificate, or one that cannot be read.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidBundle> {
        let roots = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        Self::new(roots.map_err(InvalidBundle::Pem)?)
    }

    /// Refuses what these lists say, too. A certificate of whose authority no list speaks is not revoked.
    ///
    /// # Errors
    /// When a list cannot be read.
    pub fn with_crls(
        mut self,
        crls: impl IntoIterator<Item = CertificateRevocationListDer<'static>>,
    ) -> Result<Self, InvalidBundle> {
        for crl in crls {
            let index = self.crls.len();
            let list = OwnedCertRevocationList::from_der(&crl)
                .map_err(|reason| InvalidBundle::Crl { index, reason })?;
            self.crls.push(list.into());
            self.read.push(crl);
        }
        Ok(self)
    }

    /// Refuses what the lists of a PEM text say, too.
    ///
    /// # Errors
    /// When it is no PEM, or a list cannot be read.
    pub fn with_crl_pem(self, pem: &[u8]) -> Result<Self, InvalidBundle> {
        let crls = CertificateRevocationListDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        self.with_crls(crls.map_err(InvalidBundle::Pem)?)
    }

    /// The authorities.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Whether it believes the same authorities and knows of the same revocations, in the same order.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.roots == other.roots && self.read == other.read
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    pub(crate) fn crls(&self) -> Vec<&CertRevocationList<'static>> {
        self.crls.iter().collect()
    }
}
