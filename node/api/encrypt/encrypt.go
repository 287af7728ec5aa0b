// Package encrypt seals the values of chosen resources on their way into the store and opens them on the way out: upstream's KMS v2
// envelope with the cluster's key ring in the place of a key service.
//
// A sealed value is [Prefix], then upstream's EncryptedObject: the id of the ring's key, a data key sealed by it, and the object under
// AES-GCM with a key derived for this one value (HKDF over the data key). The store's key is authenticated with it, so a value that
// somebody copies to another place does not open there. Every process makes a data key of its own for each primary key that it meets.
//
// Contract: whatever is configured, each resource's transformer reads both plain and sealed values, so servers may differ in their
// settings and the settings may change. What is not stored as it would be written now (plain, by an older key, sealed without need) is
// reported as stale: any update writes it anew, and node/api/store.Reseal does so for all. Transformers are safe for concurrent use.
// Errors name keys by id, never by value. node/api is the only caller.
package encrypt

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	"k8s.io/apiserver/pkg/storage/value/encrypt/identity"
	kmsservice "k8s.io/kms/pkg/service"

	"skein.io/skein/consensus/keyring"
)

const (
	// provider is the name under which the ring appears where upstream has that of a key service.
	provider = "skein"
	// Prefix begins every sealed value, in upstream's style.
	Prefix = "k8s:enc:kms:v2:" + provider + ":"
	// purpose binds sealed data keys to their use.
	purpose = "data key"
	// keyIDField is EncryptedObject.KeyID (kmsv2/v2/api.proto).
	keyIDField = 2
)

// Keys is where the ring comes from.
type Keys interface {
	// Ring is the ring now, and a channel that closes when it changes.
	Ring() (keyring.Ring, <-chan struct{})
	// Fetch is called when a value was sealed with a key that the ring lacks: it gets the key from another replica, or says why it
	// cannot.
	Fetch(ctx context.Context, id string) error
}

// Secrets is what is always encrypted.
var Secrets = schema.GroupResource{Resource: "secrets"}

// Transformers makes the transformers of all resources; it implements value.ResourceTransformers.
type Transformers struct {
	sealed []schema.GroupResource
	write  value.Transformer // of resources that are sealed
	plain  value.Transformer // of all others
}

// New seals Secrets and the resources.
func New(keys Keys, resources ...schema.GroupResource) *Transformers {
	s := &service{keys: keys}
	envelope := kmsv2.NewEnvelopeTransformer(s, provider, s.current, "")
	check := identity.NewEncryptCheckTransformer()
	return &Transformers{
		sealed: append(slices.Clone(resources), Secrets),
		write: value.NewPrefixTransformers(nil, value.PrefixTransformer{Prefix: []byte(Prefix), Transformer: envelope},
			value.PrefixTransformer{Transformer: check}),
		plain: plain{envelope, check},
	}
}

// Seals tells whether values of the resource are sealed.
func (t *Transformers) Seals(r schema.GroupResource) bool { return slices.Contains(t.sealed, r) }

// TransformerForResource implements value.ResourceTransformers.
func (t *Transformers) TransformerForResource(r schema.GroupResource) value.Transformer {
	if t.Seals(r) {
		return t.write
	}
	return t.plain
}

// Sealed is the transformer that seals, for values whose resource is not known.
func (t *Transformers) Sealed() value.Transformer { return t.write }

// plain writes as it is and reads both; it costs a comparison of a few bytes.
type plain struct{ sealed, check value.Transformer }

func (p plain) TransformFromStorage(ctx context.Context, data []byte, c value.Context) ([]byte, bool, error) {
	if sealed, ok := bytes.CutPrefix(data, []byte(Prefix)); ok {
		out, _, err := p.sealed.TransformFromStorage(ctx, sealed, c)
		return out, true, err
	}
	return p.check.TransformFromStorage(ctx, data, c)
}

func (p plain) TransformToStorage(_ context.Context, data []byte, _ value.Context) ([]byte, error) {
	return data, nil
}

// KeyOf is the id of the ring's key that a stored value needs, "" for a plain one.
func KeyOf(stored []byte) (string, error) {
	b, ok := bytes.CutPrefix(stored, []byte(Prefix))
	if !ok {
		return "", nil
	}
	for len(b) > 0 {
		n, t, l := protowire.ConsumeTag(b)
		if l < 0 {
			return "", fmt.Errorf("sealed value: %w", protowire.ParseError(l))
		}
		b = b[l:]
		if n == keyIDField && t == protowire.BytesType {
			id, l := protowire.ConsumeBytes(b)
			if l < 0 {
				return "", fmt.Errorf("sealed value: %w", protowire.ParseError(l))
			}
			return string(id), nil
		}
		if l = protowire.ConsumeFieldValue(n, t, b); l < 0 {
			return "", fmt.Errorf("sealed value: %w", protowire.ParseError(l))
		}
		b = b[l:]
	}
	return "", errors.New("sealed value: it names no key")
}

// service is the ring as upstream's transformer wants to see a key service, and the data key in use.
type service struct {
	keys  Keys
	state atomic.Pointer[kmsv2.State]
	mu    sync.Mutex // held while a data key is made, so that one is made
}

// forever is when data keys expire: the ring is in this process, so nothing has to be asked for again.
var forever = time.Unix(1<<40, 0)

// current is the data key for the primary key of now.
func (s *service) current() (kmsv2.State, error) {
	ring, _ := s.keys.Ring()
	if st := s.state.Load(); st != nil && st.EncryptedObjectKeyID == ring.Primary() {
		return *st, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ring, _ = s.keys.Ring()
	if st := s.state.Load(); st != nil && st.EncryptedObjectKeyID == ring.Primary() {
		return *st, nil
	}
	t, o, cacheKey, err := kmsv2.GenerateTransformer(context.Background(), rand.Text(), s, true)
	if err != nil {
		return kmsv2.State{}, fmt.Errorf("data key: %w", err)
	}
	st := &kmsv2.State{Transformer: t, EncryptedObjectKeyID: o.KeyID, EncryptedObjectEncryptedDEKSource: o.EncryptedDEKSource,
		EncryptedObjectEncryptedDEKSourceType: o.EncryptedDEKSourceType, ExpirationTimestamp: forever, CacheKey: cacheKey}
	s.state.Store(st)
	return *st, nil
}

// Encrypt seals a data key.
func (s *service) Encrypt(_ context.Context, _ string, dataKey []byte) (*kmsservice.EncryptResponse, error) {
	ring, _ := s.keys.Ring()
	b, err := ring.Seal(purpose, dataKey)
	if err != nil {
		return nil, err
	}
	id, _ := keyring.SealedBy(b)
	return &kmsservice.EncryptResponse{Ciphertext: b, KeyID: id}, nil
}

// Decrypt opens a data key; one that this node lacks the ring's key for is asked for at another replica.
func (s *service) Decrypt(ctx context.Context, _ string, r *kmsservice.DecryptRequest) ([]byte, error) {
	ring, _ := s.keys.Ring()
	b, err := ring.Open(purpose, r.Ciphertext)
	if !errors.Is(err, keyring.ErrUnknownKey) {
		return b, err
	}
	if ferr := s.keys.Fetch(ctx, r.KeyID); ferr != nil {
		return nil, fmt.Errorf("%w, and no other replica gave it: %w", err, ferr)
	}
	ring, _ = s.keys.Ring()
	return ring.Open(purpose, r.Ciphertext)
}

// Status is never asked: only upstream's health probes of remote key services do.
func (s *service) Status(context.Context) (*kmsservice.StatusResponse, error) {
	ring, _ := s.keys.Ring()
	return &kmsservice.StatusResponse{Version: kmsv2.KMSAPIVersionv2, Healthz: "ok", KeyID: ring.Primary()}, nil
}
