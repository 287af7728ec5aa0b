package desired

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
)

// KeySize is the length of the key that seals Secrets and tokens in the file, in bytes: AES-256.
const KeySize = 32

// errForeign says that an entry was sealed with another key than the node's.
var errForeign = errors.New("sealed with another key")

// sealer encrypts the entries of the kinds that are secret; nil leaves them as they are. A random nonce of 96 bits is enough: a node
// writes far fewer than 2^32 entries in its life.
type sealer struct{ aead cipher.AEAD }

func newSealer(key []byte) (*sealer, error) {
	if key == nil {
		return nil, nil
	}
	if len(key) != KeySize {
		return nil, fmt.Errorf("the key that seals the desired state has %d bytes instead of %d", len(key), KeySize)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &sealer{aead}, nil
}

// secret tells whether entries of a kind are sealed.
func secret(k Kind) bool { return k == Secrets || k == tokens }

// seal encrypts an entry; its place is authenticated with it.
func (s *sealer) seal(kind Kind, key string, plain []byte) ([]byte, error) {
	nonce := make([]byte, s.aead.NonceSize(), s.aead.NonceSize()+len(plain)+s.aead.Overhead())
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("seal: reading randomness: %w", err)
	}
	return s.aead.Seal(nonce, nonce, plain, place(kind, key)), nil
}

// open decrypts an entry; errForeign when the key is not the one that sealed it, or the entry was not at this place.
func (s *sealer) open(kind Kind, key string, b []byte) ([]byte, error) {
	if s == nil || len(b) < s.aead.NonceSize() {
		return nil, errForeign
	}
	n := s.aead.NonceSize()
	plain, err := s.aead.Open(nil, b[:n], b[n:], place(kind, key))
	if err != nil {
		return nil, errForeign
	}
	return plain, nil
}

func place(kind Kind, key string) []byte { return []byte(string(kind) + "\x00" + key) }
