package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"sort"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/lifecycle"
)

// pull is the back-off of one image in one pod.
type pull struct {
	delay time.Duration
	until time.Time
	last  string
}

// imageError is why there is no image; reason is that of the waiting container.
type imageError struct {
	reason, message string
	after           time.Duration
}

func (e *imageError) Error() string { return e.reason + ": " + e.message }

// ensureImage makes sure that the image is here, by the container's policy, and returns its ID.
func (w *worker) ensureImage(ctx context.Context, pod *corev1.Pod, spec *corev1.Container) (string, *imageError) {
	is := &runtimeapi.ImageSpec{Image: spec.Image, UserSpecifiedImage: spec.Image, Annotations: podAnnotations(pod)}
	r, err := w.a.cfg.Images.ImageStatus(ctx, is, false)
	if err != nil {
		msg := fmt.Sprintf("Failed to inspect image %q: %v", spec.Image, message(err))
		w.eventOnce(pod, spec.Name, corev1.EventTypeWarning, "InspectFailed", msg)
		reason := "ImageInspectError"
		if strings.Contains(err.Error(), "invalid reference format") {
			reason = "InvalidImageName"
		}
		return "", &imageError{reason, msg, actionRetry}
	}
	present := r.GetImage().GetId()
	switch {
	case present != "" && spec.ImagePullPolicy != corev1.PullAlways:
		w.eventf(pod, spec.Name, corev1.EventTypeNormal, "Pulled", "Container image %q already present on machine and can be accessed by the pod", spec.Image)
		return present, nil
	case spec.ImagePullPolicy == corev1.PullNever:
		msg := fmt.Sprintf("Container image %q is not present with pull policy of Never", spec.Image)
		w.eventOnce(pod, spec.Name, corev1.EventTypeWarning, "ErrImageNeverPull", msg)
		return "", &imageError{"ErrImageNeverPull", msg, actionRetry}
	}
	id, ierr := w.pullImage(ctx, pod, spec, is)
	if ierr != nil && present != "" && w.ranBefore(spec.Name) {
		// This very pod ran this image here before: a node that cannot reach the registry (or is cut off) restarts it.
		w.eventOnce(pod, spec.Name, corev1.EventTypeWarning, "Pulled", fmt.Sprintf("Image %q could not be pulled (%s); the copy that this pod already ran is used", spec.Image, ierr.message))
		return present, nil
	}
	return id, ierr
}

func (w *worker) ranBefore(container string) bool {
	rec := w.a.cfg.Desired.Record(w.uid)
	if rec == nil {
		return false
	}
	_, ok := rec.Containers[container]
	return ok
}

func (w *worker) pullImage(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, is *runtimeapi.ImageSpec) (string, *imageError) {
	now := time.Now()
	p := w.pulls[spec.Image]
	if p == nil {
		p = &pull{}
		w.pulls[spec.Image] = p
	}
	if now.Before(p.until) {
		msg := fmt.Sprintf("Back-off pulling image %q", spec.Image)
		w.eventOnce(pod, spec.Name, corev1.EventTypeNormal, "BackOff", msg)
		return "", &imageError{"ImagePullBackOff", msg + ": " + p.last, p.until.Sub(now)}
	}
	w.eventf(pod, spec.Name, corev1.EventTypeNormal, "Pulling", "Pulling image %q", spec.Image)
	id, err := w.tryPull(ctx, pod, is)
	if err != nil {
		if ctx.Err() != nil {
			return "", &imageError{"ErrImagePull", "interrupted", 0}
		}
		reason, msg := pullError(spec.Image, message(err))
		w.eventf(pod, spec.Name, corev1.EventTypeWarning, "Failed", "Failed to pull image %q: %v", spec.Image, message(err))
		p.delay = min(max(2*p.delay, lifecycle.BackoffInitial), lifecycle.BackoffMax)
		p.until = time.Now().Add(p.delay)
		p.last = reason + ": " + msg
		// The reason itself is shown first, then that the pod is held back.
		return "", &imageError{reason, msg, p.delay / 4}
	}
	delete(w.pulls, spec.Image)
	took := time.Since(now).Truncate(time.Millisecond)
	size := uint64(0)
	if r, err := w.a.cfg.Images.ImageStatus(ctx, is, false); err == nil {
		size = r.GetImage().GetSize()
	}
	w.eventf(pod, spec.Name, corev1.EventTypeNormal, "Pulled", "Successfully pulled image %q in %v (%v including waiting). Image size: %v bytes.", spec.Image, took, took, size)
	return id, nil
}

// pullError gives the errors that CRI names their own reason.
func pullError(image, msg string) (string, string) {
	for name, why := range map[string]string{"RegistryUnavailable": "the registry is unavailable", "SignatureValidationFailed": "the signature validation failed"} {
		if rest, ok := strings.CutPrefix(msg, name); ok {
			return name, fmt.Sprintf("image pull failed for %s because %s%s", image, why, rest)
		}
	}
	return "ErrImagePull", msg
}

// tryPull tries each credential that fits, or none.
func (w *worker) tryPull(ctx context.Context, pod *corev1.Pod, is *runtimeapi.ImageSpec) (string, error) {
	var secrets []*corev1.Secret
	for _, ref := range pod.Spec.ImagePullSecrets {
		s, err := w.a.cfg.Desired.Secret(pod.Namespace, ref.Name)
		if err != nil {
			w.eventOnce(pod, "", corev1.EventTypeWarning, "FailedToRetrieveImagePullSecret", fmt.Sprintf("Unable to retrieve some image pull secrets (%s); attempting to pull the image may not succeed.", ref.Name))
			continue
		}
		secrets = append(secrets, s)
	}
	sandbox, err := w.sandboxConfig(pod, 0)
	if err != nil {
		return "", err
	}
	auths := credentials(is.Image, secrets)
	if len(auths) == 0 {
		return w.a.cfg.Images.PullImage(ctx, is, nil, sandbox)
	}
	var id string
	for _, a := range auths {
		if id, err = w.a.cfg.Images.PullImage(ctx, is, a, sandbox); err == nil || ctx.Err() != nil {
			return id, err
		}
	}
	return "", err
}

type dockerAuth struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// credentials are those of the pull secrets whose registry (and path) the image lies under, the most specific first.
func credentials(image string, secrets []*corev1.Secret) []*runtimeapi.AuthConfig {
	repo := repository(image)
	type match struct {
		key  string
		auth *runtimeapi.AuthConfig
	}
	var found []match
	for _, s := range secrets {
		auths := map[string]dockerAuth{}
		if b, ok := s.Data[corev1.DockerConfigJsonKey]; ok {
			var f struct {
				Auths map[string]dockerAuth `json:"auths"`
			}
			if json.Unmarshal(b, &f) == nil {
				auths = f.Auths
			}
		} else if b, ok := s.Data[corev1.DockerConfigKey]; ok {
			_ = json.Unmarshal(b, &auths) // a broken secret holds no credential
		}
		for k, d := range auths {
			key := registryKey(k)
			if repo != key && !strings.HasPrefix(repo, strings.TrimSuffix(key, "/")+"/") {
				continue
			}
			a := &runtimeapi.AuthConfig{Username: d.Username, Password: d.Password, IdentityToken: d.IdentityToken, RegistryToken: d.RegistryToken}
			if b, err := base64.StdEncoding.DecodeString(d.Auth); err == nil && d.Auth != "" {
				a.Username, a.Password, _ = strings.Cut(string(b), ":")
			}
			found = append(found, match{key, a})
		}
	}
	sort.SliceStable(found, func(i, j int) bool { return len(found[i].key) > len(found[j].key) })
	out := make([]*runtimeapi.AuthConfig, len(found))
	for i := range found {
		out[i] = found[i].auth
	}
	return out
}

// registryKey brings a key of a Docker configuration (which may be a URL) into the form of repository.
func registryKey(k string) string {
	k = strings.TrimPrefix(strings.TrimPrefix(k, "https://"), "http://")
	k = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(k, "/"), "/v1"), "/v2")
	if k == "index.docker.io" || k == "registry-1.docker.io" {
		k = "docker.io"
	}
	return k
}

// repository is an image's registry and path, without tag and digest.
func repository(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndex(image, ":"); i > strings.LastIndex(image, "/") {
		image = image[:i]
	}
	first, rest, ok := strings.Cut(image, "/")
	if !ok {
		return "docker.io/library/" + image
	}
	if !strings.ContainsAny(first, ".:") && first != "localhost" {
		return "docker.io/" + first + "/" + rest
	}
	return image
}
