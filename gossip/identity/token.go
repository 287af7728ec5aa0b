package identity

import (
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// A join token in text is four parts joined by dots: a version, the SHA-256 of the cluster CA's DER form, the token's id (a
// name, not secret) and its secret. Binary parts are base32 in lower case without padding, so that a token survives being
// read out, and is one word to a double click's liking.
const (
	tokenVersion    = "skein1"
	tokenParts      = 4
	tokenIDBytes    = 5  // 8 characters; ids only have to differ among the few tokens of one cluster
	tokenSecretSize = 20 // bytes: 160 bits, 32 characters without a partial group
	maxTokenLength  = 256
)

var tokenEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

var (
	tokenHashLength   = tokenEncoding.EncodedLen(sha256.Size)
	tokenIDLength     = tokenEncoding.EncodedLen(tokenIDBytes)
	tokenSecretLength = tokenEncoding.EncodedLen(tokenSecretSize)
)

// ErrBadToken is wrapped by every error of [ParseToken].
var ErrBadToken = errors.New("not a valid join token")

// Token lets a machine join a cluster: it names the only CA that the machine may trust, and proves to the cluster that the
// machine was invited.
type Token struct {
	CAHash [sha256.Size]byte // SHA-256 of the cluster CA certificate's DER form
	ID     string            // names the token in lists; not secret
	Secret string            // never stored by the cluster, only its hash is
}

// NewToken makes a token for the CA with the hash, with an id and a secret (160 bits) read from rand.
func NewToken(caHash [sha256.Size]byte, rand io.Reader) (Token, error) {
	raw := make([]byte, tokenIDBytes+tokenSecretSize)
	if _, err := io.ReadFull(rand, raw); err != nil {
		return Token{}, fmt.Errorf("join token: reading randomness: %w", err)
	}
	return Token{
		CAHash: caHash,
		ID:     tokenEncoding.EncodeToString(raw[:tokenIDBytes]),
		Secret: tokenEncoding.EncodeToString(raw[tokenIDBytes:]),
	}, nil
}

// String is the token's text, secret included: it is for the one person who runs the join. Logs get [Token.LogValue].
func (t Token) String() string {
	return strings.Join([]string{tokenVersion, tokenEncoding.EncodeToString(t.CAHash[:]), t.ID, t.Secret}, ".")
}

// LogValue keeps the secret out of logs.
func (t Token) LogValue() slog.Value { return slog.StringValue("token " + t.ID) }

// ParseToken reads a token's text; space around it is ignored. Errors wrap [ErrBadToken], say what is wrong, and never repeat
// a part that may be secret.
func ParseToken(s string) (Token, error) {
	refuse := func(format string, args ...any) (Token, error) {
		return Token{}, fmt.Errorf("%w: %s", ErrBadToken, fmt.Sprintf(format, args...))
	}
	s = strings.TrimSpace(s)
	switch {
	case s == "":
		return refuse("it is empty; `skein token create` on any node of the cluster prints one")
	case len(s) > maxTokenLength:
		return refuse("it has %d characters, more than any token", len(s))
	}
	parts := strings.Split(s, ".")
	if len(parts) > 0 && parts[0] != tokenVersion {
		if strings.HasPrefix(parts[0], "skein") && len(parts) == tokenParts {
			return refuse("its version is not %s: it was made by another version of skein", tokenVersion)
		}
		return refuse("it does not begin with %q; was it copied whole?", tokenVersion+".")
	}
	if len(parts) != tokenParts {
		return refuse("it has %d parts between dots instead of %d (%s.<CA>.<id>.<secret>); was it copied whole?",
			len(parts), tokenParts, tokenVersion)
	}
	var t Token
	hash, err := decodeTokenPart(parts[1], tokenHashLength)
	if err != nil {
		return refuse("its second part, the hash of the cluster's CA, %v", err)
	}
	copy(t.CAHash[:], hash)
	if _, err := decodeTokenPart(parts[2], tokenIDLength); err != nil {
		return refuse("its third part, the id, %v", err)
	}
	if _, err := decodeTokenPart(parts[3], tokenSecretLength); err != nil {
		return refuse("its last part, the secret, %v", err)
	}
	t.ID, t.Secret = parts[2], parts[3]
	return t, nil
}

// decodeTokenPart decodes one part and checks that it is written the only way that its value can be written. The error is the
// end of a sentence.
func decodeTokenPart(s string, length int) ([]byte, error) {
	if len(s) != length {
		return nil, fmt.Errorf("has %d characters instead of %d; was it copied whole?", len(s), length)
	}
	raw, err := tokenEncoding.DecodeString(s)
	// The comparison catches stray bits in a partial last group, and line breaks, which the decoder skips.
	if err != nil || tokenEncoding.EncodeToString(raw) != s {
		return nil, errors.New("holds characters that a token cannot hold (only a-z and 2-7 are used)")
	}
	return raw, nil
}

// ValidTokenID tells whether s has the form of a token's id.
func ValidTokenID(s string) bool {
	_, err := decodeTokenPart(s, tokenIDLength)
	return err == nil
}
