package keyring

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
)

// A sealed value is: sealPrefix, the id of the key, ":", saltSize random bytes, and the output of AES-256-GCM. Key and nonce of
// GCM come from HKDF-SHA256 (RFC 5869) over the ring's key and the salt, so each is used once and no number of seals wears the
// ring's key out. The prefix and the id are authenticated too, and so is the purpose.
const (
	sealPrefix = "skein:enc:v1:"
	saltSize   = 32
	nonceSize  = 12
	headSize   = len(sealPrefix) + 2*idBytes + 1
)

// Overhead is how many bytes longer a sealed value is.
const Overhead = headSize + saltSize + 16

// ErrSealed says that a sealed value was changed, or was sealed for another purpose.
var ErrSealed = errors.New("key ring: the sealed value is damaged or not what it is taken for")

// Seal encrypts with the primary key. The same purpose (as the key of a record in the store) is needed to open it, so a sealed
// value is of no use in another place. ErrNone on an empty ring.
func (r Ring) Seal(purpose string, plain []byte) ([]byte, error) {
	k, err := r.key(r.primary)
	if err != nil {
		return nil, fmt.Errorf("seal for %s: %w", purpose, err)
	}
	out := make([]byte, headSize+saltSize, Overhead+len(plain))
	copy(out, sealPrefix+k.ID+":")
	if _, err := rand.Read(out[headSize:]); err != nil {
		return nil, fmt.Errorf("seal for %s: reading randomness: %w", purpose, err)
	}
	aead, nonce, err := k.aead(out[headSize:], purpose)
	if err != nil {
		return nil, fmt.Errorf("seal for %s: %w", purpose, err)
	}
	return aead.Seal(out, nonce, plain, out[:headSize]), nil
}

// Open decrypts what Seal made for the same purpose. ErrUnknownKey when the key is not on the ring: another replica may have it;
// ErrSealed when the value is none of ours, ErrNone on an empty ring.
func (r Ring) Open(purpose string, sealed []byte) ([]byte, error) {
	id, ok := SealedBy(sealed)
	if !ok || len(sealed) < Overhead {
		return nil, fmt.Errorf("open for %s: %w", purpose, ErrSealed)
	}
	k, err := r.key(id)
	if err != nil {
		return nil, fmt.Errorf("open for %s: %w", purpose, err)
	}
	aead, nonce, err := k.aead(sealed[headSize:headSize+saltSize], purpose)
	if err != nil {
		return nil, fmt.Errorf("open for %s: %w", purpose, err)
	}
	plain, err := aead.Open(nil, nonce, sealed[headSize+saltSize:], sealed[:headSize])
	if err != nil {
		return nil, fmt.Errorf("open for %s: %w", purpose, ErrSealed)
	}
	return plain, nil
}

// SealedBy tells whether a value has the form of a sealed one, and the id of the key.
func SealedBy(value []byte) (id string, ok bool) {
	if len(value) < headSize || !bytes.HasPrefix(value, []byte(sealPrefix)) || value[headSize-1] != ':' {
		return "", false
	}
	return string(value[len(sealPrefix) : headSize-1]), true
}

func (k Key) aead(salt []byte, purpose string) (cipher.AEAD, []byte, error) {
	material, err := hkdf.Key(sha256.New, k.secret[:], salt, "skein seal v1\x00"+purpose, KeySize+nonceSize)
	if err != nil {
		return nil, nil, err
	}
	block, err := aes.NewCipher(material[:KeySize])
	if err != nil {
		return nil, nil, err
	}
	aead, err := cipher.NewGCM(block)
	return aead, material[KeySize:], err
}
