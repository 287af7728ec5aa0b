package join

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/gossip/identity"
)

// Where the store keeps tokens, and which key a node's name was given to.
const (
	TokenPrefix = "/skein/tokens/"
	ClaimPrefix = "/skein/joined/"
)

const (
	tokenPrefix  = TokenPrefix
	joinedPrefix = ClaimPrefix

	recordVersion = 1

	// DefaultTokenTTL is how long a token is valid if nobody says otherwise.
	DefaultTokenTTL = 24 * time.Hour

	maxTokens      = 256 // in the store at once
	maxDescription = 256 // bytes
	// rememberToken is how long a token that is no longer valid stays in the list, so that whoever still uses it is told why it
	// does not work.
	rememberToken = 7 * 24 * time.Hour
	// claimHolds is how long a name that was given to a machine is kept for it until it shows up in the cluster.
	claimHolds = 2 * time.Minute

	maxConflicts = 10 // attempts of a transaction that others disturb
)

// TokenInfo describes a token; the secret is not in it, nor anywhere in the store.
type TokenInfo struct {
	ID          string    `json:"id"`
	Description string    `json:"description,omitempty"`
	Created     time.Time `json:"created"`
	Expires     time.Time `json:"expires,omitzero"`  // zero: never
	Revoked     time.Time `json:"revoked,omitzero"`  // zero: it is not
	MaxUses     int       `json:"maxUses,omitempty"` // 0: any number
	Uses        int       `json:"uses"`              // nodes that joined with it
}

// Check says why a token cannot be used at a time, or nil. The error wraps [ErrTokenRevoked], [ErrTokenExpired] or
// [ErrTokenUsedUp] and says what to do.
func (t TokenInfo) Check(now time.Time) error {
	const remedy = "make a new one with `skein token create` on any node of the cluster"
	switch {
	case !t.Revoked.IsZero():
		return fmt.Errorf("%w (%s, on %s): %s", ErrTokenRevoked, t.ID, t.Revoked.UTC().Format(time.RFC3339), remedy)
	case !t.Expires.IsZero() && !now.Before(t.Expires):
		return fmt.Errorf("%w (%s, on %s): %s", ErrTokenExpired, t.ID, t.Expires.UTC().Format(time.RFC3339), remedy)
	case t.MaxUses > 0 && t.Uses >= t.MaxUses:
		return fmt.Errorf("%w (%s, by %d of %d nodes): %s", ErrTokenUsedUp, t.ID, t.Uses, t.MaxUses, remedy)
	}
	return nil
}

// tokenRecord is a token in the store.
type tokenRecord struct {
	Version int    `json:"version"`
	Hash    []byte `json:"hash"` // SHA-256 of the secret; it has 160 random bits, so there is nothing to guess or to slow down
	TokenInfo
}

// joinedRecord says which key a node name was given to.
type joinedRecord struct {
	Version int       `json:"version"`
	Name    string    `json:"name"`
	KeyHash []byte    `json:"keyHash"` // SHA-256 of the node's public key
	TokenID string    `json:"tokenID,omitempty"`
	Joined  time.Time `json:"joined"`
}

// TokenOptions are a new token's properties.
type TokenOptions struct {
	Description string
	TTL         time.Duration // 0: it never expires; see [DefaultTokenTTL]
	MaxUses     int           // 0: any number of nodes
}

// TokenStore keeps the cluster's join tokens, and which node name was given to which key, in the store. All methods may be called
// from any goroutine of any replica. Errors of the store itself wrap [ErrUnavailable].
//
// A token's expiry is a time of day that one replica wrote and another one compares with its own clock: clocks that differ move
// it by as much. Nothing else here depends on a clock but for how long a lost claim is held.
type TokenStore struct {
	kv     clientv3.KV
	caHash [sha256.Size]byte
	now    func() time.Time
	rand   io.Reader
}

// NewTokenStore makes a TokenStore over the store (a *clientv3.Client is one) for the cluster whose CA has the hash.
func NewTokenStore(kv clientv3.KV, caHash [sha256.Size]byte) *TokenStore {
	return &TokenStore{kv: kv, caHash: caHash, now: time.Now, rand: rand.Reader}
}

// Create makes a token. Its text, which the returned Token has, is not to be had again.
func (s *TokenStore) Create(ctx context.Context, o TokenOptions) (identity.Token, TokenInfo, error) {
	var faults []error
	if o.TTL < 0 {
		faults = append(faults, fmt.Errorf("token: it would have expired %s ago", -o.TTL))
	}
	if o.MaxUses < 0 {
		faults = append(faults, fmt.Errorf("token: %d uses are none; 0 means any number", o.MaxUses))
	}
	if len(o.Description) > maxDescription {
		faults = append(faults, fmt.Errorf("token: the description has %d bytes, at most %d are kept", len(o.Description), maxDescription))
	}
	if err := errors.Join(faults...); err != nil {
		return identity.Token{}, TokenInfo{}, fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	if err := s.tidy(ctx); err != nil {
		return identity.Token{}, TokenInfo{}, err
	}
	token, err := identity.NewToken(s.caHash, s.rand)
	if err != nil {
		return identity.Token{}, TokenInfo{}, err
	}
	now := s.now().UTC().Truncate(time.Second)
	hash := sha256.Sum256([]byte(token.Secret))
	record := tokenRecord{Version: recordVersion, Hash: hash[:],
		TokenInfo: TokenInfo{ID: token.ID, Description: o.Description, Created: now, MaxUses: o.MaxUses}}
	if o.TTL > 0 {
		record.Expires = now.Add(o.TTL)
	}
	key := tokenPrefix + token.ID
	done, err := s.commit(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(key), "=", 0)}, put(key, record))
	if err != nil {
		return identity.Token{}, TokenInfo{}, err
	}
	if !done {
		return identity.Token{}, TokenInfo{}, fmt.Errorf("token %s: its id exists already; try again", token.ID)
	}
	return token, record.TokenInfo, nil
}

// tidy drops tokens that have been of no use for long, and refuses a new one if there are too many.
func (s *TokenStore) tidy(ctx context.Context) error {
	all, err := s.List(ctx)
	if err != nil {
		return err
	}
	now, left := s.now(), 0
	for _, t := range all {
		end := t.Expires
		if !t.Revoked.IsZero() {
			end = t.Revoked
		}
		if end.IsZero() || now.Sub(end) < rememberToken {
			left++
			continue
		}
		if _, err := s.kv.Delete(ctx, tokenPrefix+t.ID); err != nil {
			return unavailable(err)
		}
	}
	if left >= maxTokens {
		return fmt.Errorf("%w: there are %d tokens already, no more than %d are kept: revoke some; revoked and expired ones go after %s",
			ErrBadRequest, left, maxTokens, rememberToken)
	}
	return nil
}

// List returns all tokens, oldest first, those that can no longer be used for a week too.
func (s *TokenStore) List(ctx context.Context) ([]TokenInfo, error) {
	got, err := s.kv.Get(ctx, tokenPrefix, clientv3.WithPrefix())
	if err != nil {
		return nil, unavailable(err)
	}
	out := make([]TokenInfo, 0, len(got.Kvs))
	for _, kv := range got.Kvs {
		record, err := decodeToken(kv.Value)
		if err != nil {
			return nil, fmt.Errorf("token %s: %w", strings.TrimPrefix(string(kv.Key), tokenPrefix), err)
		}
		out = append(out, record.TokenInfo)
	}
	slices.SortStableFunc(out, func(a, b TokenInfo) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// Revoke makes a token useless, at once and for good; to revoke it again changes nothing. An unknown one is [ErrTokenUnknown].
func (s *TokenStore) Revoke(ctx context.Context, id string) error {
	for range maxConflicts {
		record, revision, err := s.get(ctx, id)
		if err != nil {
			return err
		}
		if !record.Revoked.IsZero() {
			return nil
		}
		record.Revoked = s.now().UTC().Truncate(time.Second)
		key := tokenPrefix + id
		done, err := s.commit(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", revision)}, put(key, record))
		if err != nil || done {
			return err
		}
	}
	return busy("token " + id)
}

// Verify checks a token's secret, and that it is neither revoked nor expired. Whether uses are left is not asked here but when
// one is taken ([TokenStore.Enrol]). Without the right secret every token is [ErrTokenUnknown].
func (s *TokenStore) Verify(ctx context.Context, id, secret string) (TokenInfo, error) {
	record, _, err := s.get(ctx, id)
	if err != nil {
		return TokenInfo{}, err
	}
	hash := sha256.Sum256([]byte(secret))
	if subtle.ConstantTimeCompare(hash[:], record.Hash) != 1 {
		return TokenInfo{}, unknownToken()
	}
	info := record.TokenInfo
	info.MaxUses = 0
	if err := info.Check(s.now()); err != nil {
		return TokenInfo{}, err
	}
	return record.TokenInfo, nil
}

func unknownToken() error {
	return fmt.Errorf("%w to this cluster: `skein token list` on any node shows those that are, `skein token create` makes one", ErrTokenUnknown)
}

// get reads a token and its revision.
func (s *TokenStore) get(ctx context.Context, id string) (tokenRecord, int64, error) {
	if !identity.ValidTokenID(id) {
		return tokenRecord{}, 0, unknownToken()
	}
	got, err := s.kv.Get(ctx, tokenPrefix+id)
	if err != nil {
		return tokenRecord{}, 0, unavailable(err)
	}
	if len(got.Kvs) == 0 {
		return tokenRecord{}, 0, unknownToken()
	}
	record, err := decodeToken(got.Kvs[0].Value)
	if err != nil {
		return tokenRecord{}, 0, fmt.Errorf("token %s: %w", id, err)
	}
	return record, got.Kvs[0].ModRevision, nil
}

// Claim is a machine's wish to be a node.
type Claim struct {
	Name    string
	KeyHash [sha256.Size]byte // identity.KeyHash of its public key
	// TokenID of the token that it was let in with; empty for the node that founded the cluster, which needs none.
	TokenID string
	// Exists tells whether a node of that name is known in the cluster, apart from what this store remembers.
	Exists bool
}

// Enrol gives a node name to a key and takes a use of the token, in one transaction. A name that the key already has stays its,
// and takes no use. A name that another key has is [ErrNameTaken] while a node of that name exists, and for two minutes after
// it was given, in which the node has to show up.
func (s *TokenStore) Enrol(ctx context.Context, c Claim) error {
	if err := identity.ValidateName(c.Name); err != nil {
		return err
	}
	for range maxConflicts {
		done, err := s.tryEnrol(ctx, c)
		if err != nil || done {
			return err
		}
	}
	return busy("node " + c.Name)
}

func (s *TokenStore) tryEnrol(ctx context.Context, c Claim) (done bool, err error) {
	key := joinedPrefix + c.Name
	got, err := s.kv.Get(ctx, key)
	if err != nil {
		return false, unavailable(err)
	}
	var revision int64 // 0: the key must not exist
	if len(got.Kvs) > 0 {
		revision = got.Kvs[0].ModRevision
		known, err := decodeJoined(got.Kvs[0].Value)
		if err != nil {
			return false, fmt.Errorf("node %q: %w", c.Name, err)
		}
		if string(known.KeyHash) == string(c.KeyHash[:]) {
			return true, nil
		}
		if since := s.now().Sub(known.Joined); !c.Exists && since >= 0 && since < claimHolds {
			return false, fmt.Errorf("%w: %q was given to a machine %s ago that has not shown up yet; choose another name, or try again in %s if it was this one",
				ErrNameTaken, c.Name, since.Round(time.Second), (claimHolds - since).Round(time.Second))
		}
	}
	if c.Exists {
		return false, fmt.Errorf("%w: there is a node %q with another key; choose another name (--name), or, if this machine replaces that one, "+
			"let it leave or delete it first (`skein delete node %s`)", ErrNameTaken, c.Name, c.Name)
	}
	conditions := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", revision)}
	writes := []clientv3.Op{put(key, joinedRecord{Version: recordVersion, Name: c.Name, KeyHash: c.KeyHash[:], TokenID: c.TokenID,
		Joined: s.now().UTC().Truncate(time.Second)})}
	if c.TokenID != "" {
		token, tokenRevision, err := s.get(ctx, c.TokenID)
		if err != nil {
			return false, err
		}
		if err := token.Check(s.now()); err != nil {
			return false, err
		}
		token.Uses++
		tokenKey := tokenPrefix + c.TokenID
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(tokenKey), "=", tokenRevision))
		writes = append(writes, put(tokenKey, token))
	}
	return s.commit(ctx, conditions, writes...)
}

// Enrolled tells whether a node name was given to a key: ErrNotEnrolled if not.
func (s *TokenStore) Enrolled(ctx context.Context, name string, keyHash [sha256.Size]byte) error {
	if err := identity.ValidateName(name); err != nil {
		return err
	}
	got, err := s.kv.Get(ctx, joinedPrefix+name)
	if err != nil {
		return unavailable(err)
	}
	if len(got.Kvs) == 0 {
		return fmt.Errorf("%w: no node %q belongs to this cluster, or not any more; it has to join again", ErrNotEnrolled, name)
	}
	known, err := decodeJoined(got.Kvs[0].Value)
	if err != nil {
		return fmt.Errorf("node %q: %w", name, err)
	}
	if subtle.ConstantTimeCompare(known.KeyHash, keyHash[:]) != 1 {
		return fmt.Errorf("%w: the name %q belongs to a node with another key", ErrNotEnrolled, name)
	}
	return nil
}

// Release forgets which key a node name was given to, once the node is gone for good.
func (s *TokenStore) Release(ctx context.Context, name string) error {
	if _, err := s.kv.Delete(ctx, joinedPrefix+name); err != nil {
		return unavailable(err)
	}
	return nil
}

func (s *TokenStore) commit(ctx context.Context, conditions []clientv3.Cmp, writes ...clientv3.Op) (done bool, err error) {
	result, err := s.kv.Txn(ctx).If(conditions...).Then(writes...).Commit()
	if err != nil {
		return false, unavailable(err)
	}
	return result.Succeeded, nil
}

// put writes a record, whose kinds all have a JSON form.
func put(key string, record any) clientv3.Op {
	data, err := json.Marshal(record)
	if err != nil {
		panic(fmt.Sprintf("join: record %T: %v", record, err))
	}
	return clientv3.OpPut(key, string(data))
}

func decodeToken(data []byte) (tokenRecord, error) {
	var r tokenRecord
	err := json.Unmarshal(data, &r)
	return r, checkRecord(err, r.Version, len(r.Hash))
}

func decodeJoined(data []byte) (joinedRecord, error) {
	var r joinedRecord
	err := json.Unmarshal(data, &r)
	return r, checkRecord(err, r.Version, len(r.KeyHash))
}

func checkRecord(err error, version, hash int) error {
	switch {
	case err != nil:
		return fmt.Errorf("its record in the store cannot be read: %w", err)
	case version < 1 || version > recordVersion:
		return fmt.Errorf("its record in the store has version %d, this skein knows versions up to %d", version, recordVersion)
	case hash != sha256.Size:
		return fmt.Errorf("its record in the store has a hash of %d bytes instead of %d", hash, sha256.Size)
	}
	return nil
}

func unavailable(err error) error { return fmt.Errorf("%w: the store: %w", ErrUnavailable, err) }

func busy(what string) error {
	return fmt.Errorf("%w: %s was changed by others %d times in a row; try again", ErrUnavailable, what, maxConflicts)
}
