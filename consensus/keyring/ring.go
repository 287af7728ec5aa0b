package keyring

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
)

const (
	// KeySize is the length of a key in bytes: AES-256.
	KeySize = 32
	// MaxKeys bounds a ring. A rotation adds one key and drops one; more than a few are left only when rotations cannot end.
	MaxKeys = 32

	formatVersion = 1
	maxEncoded    = 64 << 10 // bytes; a full ring has about 5 KiB
	idBytes       = 8        // of the hash; ids only have to differ among the keys of one cluster
)

var (
	// ErrCorrupt says that bytes are not what this package once wrote.
	ErrCorrupt = errors.New("key ring: corrupt")
	// ErrNewer says that a later release wrote the bytes.
	ErrNewer = errors.New("key ring: written by a later version")
	// ErrUnknownKey says that a key is not on the ring.
	ErrUnknownKey = errors.New("key ring: the key is not on this node's ring")
	// ErrPrimary says that the key that seals cannot be dropped.
	ErrPrimary = errors.New("key ring: the key is the primary one")
	// ErrFull says that a ring takes no further key.
	ErrFull = errors.New("key ring: full")
)

// Key is one key-encryption key.
type Key struct {
	// ID names the key: 16 hex digits of the SHA-256 of its secret, so that an id stands for one secret only and a damaged
	// secret is noticed. It is not secret.
	ID      string
	Created time.Time
	secret  *[KeySize]byte // a pointer: fmt calls no methods on fields that are not exported, and would print an array
}

// NewKey reads a key from random (crypto/rand.Reader).
func NewKey(random io.Reader, now time.Time) (Key, error) {
	k := Key{Created: now.UTC().Truncate(time.Second), secret: new([KeySize]byte)}
	if _, err := io.ReadFull(random, k.secret[:]); err != nil {
		return Key{}, fmt.Errorf("key ring: reading randomness: %w", err)
	}
	k.ID = idOf(k.secret)
	return k, nil
}

func idOf(secret *[KeySize]byte) string {
	h := sha256.Sum256(append([]byte("skein key id\x00"), secret[:]...))
	return hex.EncodeToString(h[:idBytes])
}

// String, GoString and LogValue keep the secret out of logs and error texts.
func (k Key) String() string       { return "key " + k.ID }
func (k Key) GoString() string     { return k.String() }
func (k Key) LogValue() slog.Value { return slog.StringValue(k.String()) }

// Ring is an immutable set of keys. The zero Ring has none and can neither seal nor open.
type Ring struct {
	keys    []Key // in the order in which they were added; never changed in place
	primary string
}

// New makes a ring with one key, the primary.
func New(random io.Reader, now time.Time) (Ring, error) {
	k, err := NewKey(random, now)
	if err != nil {
		return Ring{}, err
	}
	return Ring{keys: []Key{k}, primary: k.ID}, nil
}

// Empty tells whether the ring has no key.
func (r Ring) Empty() bool { return len(r.keys) == 0 }

// Primary is the id of the key that seals, "" on an empty ring.
func (r Ring) Primary() string { return r.primary }

// IDs are the ids of all keys, oldest first.
func (r Ring) IDs() []string {
	out := make([]string, len(r.keys))
	for i, k := range r.keys {
		out[i] = k.ID
	}
	return out
}

// Keys are all keys, oldest first.
func (r Ring) Keys() []Key { return slices.Clone(r.keys) }

// Has tells whether the ring has the key.
func (r Ring) Has(id string) bool { return r.index(id) >= 0 }

func (r Ring) index(id string) int {
	return slices.IndexFunc(r.keys, func(k Key) bool { return k.ID == id })
}

func (r Ring) key(id string) (Key, error) {
	if r.Empty() {
		return Key{}, ErrNone
	}
	if i := r.index(id); i >= 0 {
		return r.keys[i], nil
	}
	return Key{}, fmt.Errorf("%w: %s (it has %s)", ErrUnknownKey, id, r)
}

// String lists the ids, the primary one with a star.
func (r Ring) String() string {
	if r.Empty() {
		return "no keys"
	}
	out := r.IDs()
	for i, id := range out {
		if id == r.primary {
			out[i] += "*"
		}
	}
	return strings.Join(out, " ")
}

// GoString and LogValue keep the secrets out of logs and error texts.
func (r Ring) GoString() string     { return r.String() }
func (r Ring) LogValue() slog.Value { return slog.StringValue(r.String()) }

// Equal tells whether two rings have the same keys and the same primary.
func (r Ring) Equal(o Ring) bool {
	if r.primary != o.primary || len(r.keys) != len(o.keys) {
		return false
	}
	for _, id := range r.IDs() {
		if !o.Has(id) {
			return false
		}
	}
	return true
}

// Add puts a key beside the others; it seals only after [Ring.Use]. The first key of an empty ring becomes its primary. A key that
// is there already changes nothing. ErrFull when there are MaxKeys.
func (r Ring) Add(k Key) (Ring, error) {
	if r.Has(k.ID) {
		return r, nil
	}
	if k.secret == nil || k.ID != idOf(k.secret) {
		return r, fmt.Errorf("%w: key %q is not named after its secret", ErrCorrupt, k.ID)
	}
	if len(r.keys) >= MaxKeys {
		return r, fmt.Errorf("%w: it has %d keys, no more than %d are kept", ErrFull, len(r.keys), MaxKeys)
	}
	out := Ring{keys: append(slices.Clone(r.keys), k), primary: r.primary}
	if out.primary == "" {
		out.primary = k.ID
	}
	return out, nil
}

// Use makes a key the primary one. ErrUnknownKey if the ring has it not, ErrNone if it has no key at all.
func (r Ring) Use(id string) (Ring, error) {
	if _, err := r.key(id); err != nil {
		return r, err
	}
	return Ring{keys: r.keys, primary: id}, nil
}

// Drop takes a key off the ring: what it sealed cannot be opened any more. ErrPrimary for the one that seals; a key that is not
// there changes nothing.
func (r Ring) Drop(id string) (Ring, error) {
	if id == r.primary && id != "" {
		return r, fmt.Errorf("%w: %s", ErrPrimary, id)
	}
	return Ring{keys: slices.DeleteFunc(slices.Clone(r.keys), func(k Key) bool { return k.ID == id }), primary: r.primary}, nil
}

// Only is a ring with one of the keys alone. ErrUnknownKey if the ring has it not, ErrNone if it has no key at all.
func (r Ring) Only(id string) (Ring, error) {
	k, err := r.key(id)
	if err != nil {
		return Ring{}, err
	}
	return Ring{keys: []Key{k}, primary: k.ID}, nil
}

// Merge adds the keys of another ring. The primary stays; an empty ring takes the other's.
func (r Ring) Merge(o Ring) (Ring, error) {
	out := r
	for _, k := range o.keys {
		var err error
		if out, err = out.Add(k); err != nil {
			return r, err
		}
	}
	if r.Empty() && !o.Empty() {
		return out.Use(o.primary)
	}
	return out, nil
}

// record is the encoded form of a ring: JSON, also in orders between nodes and in backups. Fields that are not known are ignored.
type record struct {
	Version int         `json:"version"`
	Primary string      `json:"primary"`
	Keys    []keyRecord `json:"keys"`
}

type keyRecord struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	Secret  []byte    `json:"secret"`
}

// Encode writes the ring, secrets included: for its file, for another replica, for a backup.
func (r Ring) Encode() []byte {
	out := record{Version: formatVersion, Primary: r.primary, Keys: []keyRecord{}}
	for _, k := range r.keys {
		out.Keys = append(out.Keys, keyRecord{ID: k.ID, Created: k.Created, Secret: k.secret[:]})
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		panic(fmt.Sprintf("keyring: encode: %v", err)) // strings, bytes and times of our own making
	}
	return append(b, '\n')
}

// Decode reads what Encode wrote. Errors wrap ErrCorrupt or ErrNewer and never repeat what they read.
func Decode(b []byte) (Ring, error) {
	bad := func(format string, a ...any) (Ring, error) {
		return Ring{}, fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, a...))
	}
	if len(b) > maxEncoded {
		return bad("%d bytes are more than a ring has", len(b))
	}
	var in record
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&in); err != nil {
		return bad("it is no JSON object of its form") // the decoder's own words may quote a secret
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return bad("something follows it")
	}
	switch {
	case in.Version > formatVersion:
		return Ring{}, fmt.Errorf("%w: it has version %d, this skein knows versions up to %d", ErrNewer, in.Version, formatVersion)
	case in.Version < 1:
		return bad("it has no version")
	case len(in.Keys) > MaxKeys:
		return bad("it has %d keys, more than %d", len(in.Keys), MaxKeys)
	}
	var out Ring
	for i, x := range in.Keys {
		k := Key{ID: x.ID, Created: x.Created.UTC().Truncate(time.Second), secret: new([KeySize]byte)}
		if len(x.Secret) != KeySize {
			return bad("key %d has %d bytes instead of %d", i+1, len(x.Secret), KeySize)
		}
		copy(k.secret[:], x.Secret)
		if idOf(k.secret) != k.ID {
			return bad("key %d is not what its id says", i+1)
		}
		if out.Has(k.ID) {
			return bad("key %s is there twice", k.ID)
		}
		out.keys = append(out.keys, k)
	}
	if len(out.keys) > 0 && !out.Has(in.Primary) || len(out.keys) == 0 && in.Primary != "" {
		return bad("its primary key is not among its %d keys", len(out.keys))
	}
	out.primary = in.Primary
	return out, nil
}
