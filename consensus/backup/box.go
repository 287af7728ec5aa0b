package backup

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"

	"golang.org/x/crypto/scrypt"
)

// Box holds the key ring, sealed with a passphrase or in clear. The zero value
// is the box of a cluster without one.
type Box struct {
	// Sealed says that Data is AES-256-GCM of the ring under a key that scrypt makes
	// of a passphrase.
	Sealed bool   `json:"sealed,omitempty"`
	Salt   []byte `json:"salt,omitempty"`
	Nonce  []byte `json:"nonce,omitempty"`
	// LogN is scrypt's cost as a power of two; r is 8, p is 1.
	LogN int    `json:"logN,omitempty"`
	Data []byte `json:"data,omitempty"`
}

const (
	// scryptLogN is 2^15: the cost that the author of scrypt recommends for
	// interactive use (golang.org/x/crypto/scrypt), 32 MiB and 0.1 s.
	scryptLogN = 15
	// maxLogN bounds what a file can make its reader spend: 2^20 are 1 GiB.
	maxLogN = 20
	scryptR = 8
	scryptP = 1
	keySize = 32
)

var (
	// ErrPassphrase is for a box that needs a passphrase, or another one.
	ErrPassphrase = errors.New("the passphrase is missing or wrong")
	errBox        = errors.New("its key ring is malformed")
)

// sealedData binds the box to its purpose.
var sealedData = []byte("skein backup key ring 1")

// Seal puts a ring into a box; without a passphrase in clear.
func Seal(ring, passphrase []byte) (Box, error) {
	if len(passphrase) == 0 {
		return Box{Data: ring}, nil
	}
	b := Box{Sealed: true, LogN: scryptLogN, Salt: make([]byte, 16)}
	if _, err := rand.Read(b.Salt); err != nil {
		return Box{}, fmt.Errorf("backup: %w", err)
	}
	a, err := b.aead(passphrase)
	if err != nil {
		return Box{}, err
	}
	b.Nonce = make([]byte, a.NonceSize())
	if _, err := rand.Read(b.Nonce); err != nil {
		return Box{}, fmt.Errorf("backup: %w", err)
	}
	b.Data = a.Seal(nil, b.Nonce, ring, sealedData)
	return b, nil
}

// Open returns the ring. Errors wrap ErrPassphrase when that is the cause.
func (b Box) Open(passphrase []byte) ([]byte, error) {
	if !b.Sealed {
		return b.Data, nil
	}
	if len(passphrase) == 0 {
		return nil, fmt.Errorf("backup: its keys are sealed: %w", ErrPassphrase)
	}
	a, err := b.aead(passphrase)
	if err != nil {
		return nil, err
	}
	if len(b.Nonce) != a.NonceSize() {
		return nil, fmt.Errorf("backup: %w", errBox)
	}
	ring, err := a.Open(nil, b.Nonce, b.Data, sealedData)
	if err != nil {
		return nil, fmt.Errorf("backup: its keys are sealed: %w", ErrPassphrase)
	}
	return ring, nil
}

func (b Box) aead(passphrase []byte) (cipher.AEAD, error) {
	if b.LogN < 1 || b.LogN > maxLogN || len(b.Salt) < 8 {
		return nil, fmt.Errorf("backup: %w", errBox)
	}
	key, err := scrypt.Key(passphrase, b.Salt, 1<<b.LogN, scryptR, scryptP, keySize)
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	return cipher.NewGCM(block)
}
